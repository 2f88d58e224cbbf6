"""A real nginx in front of a server under test."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# Debian installs it where only root looks.
NGINX = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))

# Started by root, its workers would run as `nobody`, which may not read the test's directory.
USER = "user root;" if os.geteuid() == 0 else ""

CONFIGURATION = """
{user}
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{servers}
}}
"""


def nginx_command(directory: Path, servers: str) -> list[str]:
    """Write a configuration with these server blocks, and give the command that runs it.

    The test is skipped where nginx is not installed.
    """
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    path = directory / "nginx.conf"
    path.write_text(CONFIGURATION.format(user=USER, directory=directory, servers=servers), "utf-8")
    return [NGINX, "-c", str(path)]

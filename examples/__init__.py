"""Programs that show the library at work; not part of the installed package."""

def draw(tables): return ""

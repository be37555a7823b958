"""The template of `report.html`: head, styles for light and dark mode, and a slot for the body."""

from __future__ import annotations

# `{title}` and `{body}` are replaced, not formatted: CSS is full of braces.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - TexForce run</title>
<style>
:root {
  --page: #f6f7f9; --card: #fff; --ink: #1c1f24; --muted: #667080; --line: #e3e6eb;
  --up: #117a3d; --down: #b3261e;
  --c0: #2f6fde; --c1: #d9822b; --c2: #1f9d6b; --c3: #8a5bd6;
  --c4: #c8447c; --c5: #2a9db5; --c6: #8a8f3c; --c7: #7b8494;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1d2026; --ink: #e6e8ec; --muted: #98a1b0; --line: #31363f;
    --up: #5fd08f; --down: #ff8a80;
    --c0: #6ea0ff; --c1: #f0a95c; --c2: #4fcf9a; --c3: #b592f0;
    --c4: #ee80ad; --c5: #62c9de; --c6: #bfc56a; --c7: #a4adbb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 28px 20px 48px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0 0 16px; font-size: 24px; font-weight: 600; overflow-wrap: anywhere; }
h1 small { display: block; color: var(--muted); font-size: 14px; font-weight: 400; }
h2 { margin: 32px 0 12px; font-size: 17px; font-weight: 600; }
figure { margin: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; }
.figures div, .chart, .picture, table, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
.figures div { flex: 1 1 180px; padding: 10px 14px; color: var(--muted); font-size: 13px; }
.figures b { display: block; color: var(--ink); font-size: 22px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr));
  gap: 14px; }
.chart { padding: 12px 14px 8px; min-width: 0; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
figcaption small { color: var(--muted); font-weight: 400; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 2px 0 4px; font-size: 12px;
  color: var(--muted); }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px;
  border-radius: 2px; }
.legend b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 12px; }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
svg .band { opacity: .16; }
svg .grid { stroke: var(--line); stroke-width: 1; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 14px; align-items: start; }
.picture { padding: 12px 14px; margin-bottom: 14px; }
.picture img { display: block; max-width: 100%; height: auto; margin-top: 8px; border-radius: 4px; }
.strip { display: grid; gap: 3px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.strip div { display: flex; align-items: center; gap: 14px; }
.strip span { flex: 0 0 130px; color: var(--muted); font-size: 13px; text-align: right;
  overflow-wrap: anywhere; }
.strip img { display: block; height: 72px; border-radius: 4px; }
.wide { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; }
th, td { padding: 7px 14px; text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-size: 13px; font-weight: 500; }
td { border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.up { color: var(--up); font-weight: 600; }
.down { color: var(--down); font-weight: 600; }
details { margin-top: 32px; padding: 10px 14px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
</style>
</head>
<body>
<h1>{title}<small>TexForce run report</small></h1>
{body}
</body>
</html>
"""

"""The style sheets of what is shown: colours by name, light and dark; the charts; the page around them."""

from typing import Final

COLOURS: Final = (
    "--tm-bg:#fff;--tm-fg:#0f172a;--tm-dim:#5b6b82;--tm-rule:#e2e8f0;--tm-card:#f8fafc;"
    "--tm-a:#0f766e;--tm-b:#b45309;--tm-c:#7c8ba1;--tm-fill:#0f766e24;--tm-bad:#b91c1c;--tm-bar:#8fbfb9"
)
"""On a light ground."""
COLOURS_DARK: Final = (
    "--tm-bg:#0b1220;--tm-fg:#e2e8f0;--tm-dim:#94a3b8;--tm-rule:#1e293b;--tm-card:#111a2e;"
    "--tm-a:#2dd4bf;--tm-b:#f0b35a;--tm-c:#7f8ea6;--tm-fill:#2dd4bf24;--tm-bad:#f87171;--tm-bar:#256b65"
)

_FONT: Final = 'ui-sans-serif,system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif'

CHART: Final = f"""
.tm text{{fill:var(--tm-dim);font:11px {_FONT}}}
.tm path{{fill:none;stroke-linejoin:round}}
.tm .grid{{stroke:var(--tm-rule)}}
.tm .zero{{stroke:var(--tm-dim)}}
.tm .rule{{stroke:var(--tm-dim);stroke-dasharray:2 3}}
.tm .a{{stroke:var(--tm-a);stroke-width:2}}
.tm .b{{stroke:var(--tm-b);stroke-width:1.6}}
.tm .c{{stroke:var(--tm-c);stroke-width:2;stroke-dasharray:5 3}}
.tm .dots{{stroke-width:3.5;stroke-linecap:round;opacity:.4}}
.tm .big{{stroke-width:7;opacity:1}}
.tm path.fill{{fill:var(--tm-fill)}}
.tm .bars{{stroke:var(--tm-bar)}}
.tm path.moved{{fill:var(--tm-a)}}
.tm path.refused{{fill:var(--tm-bad)}}
.tm .rejected{{stroke:var(--tm-bad);stroke-width:1.8}}
.tm .hit{{fill:transparent}}
.tm .hit:hover{{fill:var(--tm-fill)}}
"""
"""A chart is of class `tm`. Its lines are `a`, `b` and `c`, its marks `moved`, `refused` and `rejected`."""

BLOCK: Final = f"""
.tidemill{{{COLOURS};color-scheme:light dark}}
@media(prefers-color-scheme:dark){{.tidemill{{{COLOURS_DARK}}}}}
{CHART}
.tidemill{{background:var(--tm-bg);color:var(--tm-fg);font:15px/1.5 {_FONT}}}
.tidemill{{max-width:1120px;margin:0 auto;padding:28px 24px 48px}}
.tidemill,.tidemill *{{box-sizing:border-box}}
.tidemill h1{{font-size:26px;margin:0;overflow-wrap:anywhere}}
.tidemill h1 small{{font-weight:400;color:var(--tm-dim);font-size:15px;margin-left:10px}}
.tidemill h2{{font-size:16px;margin:32px 0 4px}}
.tidemill p{{margin:0 0 8px;color:var(--tm-dim);font-size:13.5px}}
.tidemill .cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:10px;margin:20px 0 6px}}
.tidemill .card{{background:var(--tm-card);border:1px solid var(--tm-rule);border-radius:10px;padding:12px 14px}}
.tidemill .card>*{{display:block}}
.tidemill .card b{{font-size:24px;line-height:1.2;font-variant-numeric:tabular-nums}}
.tidemill .card span{{font-size:13px}}
.tidemill .card i{{font-style:normal;color:var(--tm-dim);font-size:12px;line-height:1.35;overflow-wrap:anywhere}}
.tidemill svg{{width:100%;height:auto;display:block;overflow:visible}}
.tidemill .legend{{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:12.5px;color:var(--tm-dim);margin:2px 0 6px}}
.tidemill .legend u{{display:inline-block;width:18px;border-top:2px solid var(--tm-a);vertical-align:middle;margin-right:6px}}
.tidemill .legend u.b{{border-color:var(--tm-b)}}
.tidemill .legend u.c{{border-top:2px dashed var(--tm-c)}}
.tidemill .legend em{{font-style:normal;margin-right:5px;color:var(--tm-a)}}
.tidemill .legend em.r{{color:var(--tm-bad)}}
.tidemill .wide{{overflow-x:auto}}
.tidemill table{{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}}
.tidemill th,.tidemill td{{text-align:left;padding:5px 10px;border-bottom:1px solid var(--tm-rule);vertical-align:top}}
.tidemill th{{font-weight:500;color:var(--tm-dim)}}
.tidemill td{{overflow-wrap:anywhere}}
.tidemill .n{{text-align:right;white-space:nowrap}}
.tidemill .t{{white-space:nowrap}}
.tidemill .mono{{font-family:ui-monospace,monospace;color:var(--tm-dim)}}
.tidemill .tag{{font-size:12px;padding:1px 8px;border-radius:99px;background:var(--tm-fill);color:var(--tm-a);white-space:nowrap}}
.tidemill .tag.refused{{color:var(--tm-bad);background:none;border:1px solid var(--tm-bad)}}
.tidemill .two{{display:grid;grid-template-columns:1fr 2fr;gap:28px}}
.tidemill dl{{display:grid;grid-template-columns:auto 1fr;gap:3px 16px;font-size:13px;margin:6px 0}}
.tidemill dt{{color:var(--tm-dim)}}
.tidemill dd{{margin:0;overflow-wrap:anywhere}}
@media(max-width:800px){{.tidemill .two{{grid-template-columns:1fr}}.tidemill dl{{grid-template-columns:1fr}}}}
"""
"""What stands in an element of class `tidemill`: of a page, or of a notebook, whose own styles are left alone."""

PAGE: Final = """
body{margin:0;background:#fff}
@media(prefers-color-scheme:dark){body{background:#0b1220}}
@media print{.tidemill h2{break-after:avoid}.tidemill svg,.tidemill tr{break-inside:avoid}}
"""

"""The style sheet of the report's page: light and dark by the reader's wish, and legible on paper."""

STYLE = """
:root{--ink:#1c2430;--quiet:#5b6675;--paper:#fff;--panel:#f5f7fa;--line:#dde3ea;--kept:#2563b0;--removed:#d9822b;
--edited:#2a8c82;--flagged:#8a63b8;--bad:#b3364b;--before:#c9d0da;--outline:#6b7686;--mark:#ffe08a}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ee;--quiet:#9aa5b4;--paper:#14181f;--panel:#1d232c;--line:#343d4a;
--kept:#5b9ef0;--removed:#eda04f;--edited:#4db8ac;--flagged:#b08ee0;
--bad:#e86b7f;--before:#56637a;--outline:#a9b4c3;--mark:#6b5410}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 60px}
h1{margin:0;font-size:26px}
h2{margin:0 0 10px;font-size:19px}
header p{margin:2px 0 0;color:var(--quiet)}
section{margin-top:30px;padding-top:20px;border-top:1px solid var(--line)}
code,pre,.rule,.text{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
.note,.quiet,.place,.legend{color:var(--quiet)}
.note{margin:0 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(146px,1fr));gap:10px;margin-top:10px}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.tiles b{font-size:19px;font-variant-numeric:tabular-nums}
.tiles small{margin-left:7px;color:var(--quiet)}
.tiles span{display:block;color:var(--quiet);font-size:13px}
.legend{margin:6px 0 10px;font-size:13px}
.legend span{margin-right:18px}
.legend i{display:inline-block;width:12px;height:12px;margin-right:6px;border-radius:2px;vertical-align:-1px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:18px 34px;align-items:start}
.stack{display:grid;gap:18px}
figure{margin:0;break-inside:avoid}
figcaption{margin-bottom:6px;font-weight:600}
svg{display:block;width:100%;height:auto}
.fates svg{border-radius:4px}
svg text{font-size:12.5px;fill:var(--ink)}
svg .quiet{fill:var(--quiet)}
svg .number{font-variant-numeric:tabular-nums}
.edited{fill:var(--edited)}
.flagged{fill:var(--flagged)}
.kept,.after{fill:var(--kept);background:var(--kept)}
.removed{fill:var(--removed);background:var(--removed)}
.bad{fill:var(--bad);background:var(--bad)}
.before{fill:var(--before);background:var(--before)}
.outline{fill:none;stroke:var(--outline);stroke-width:1.2}
.axis{stroke:var(--outline)}
.grid{stroke:var(--line)}
.hover{fill:transparent}
table{border-collapse:collapse;width:100%;font-size:14px}
table.narrow{width:auto}
table.small{margin-top:6px;font-size:13px}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;white-space:pre-wrap;
overflow-wrap:anywhere}
th{font-weight:600}
table.small th{white-space:nowrap}
h2,.note,.legend,summary{break-after:avoid}
.number{font-variant-numeric:tabular-nums}
th.number,td.number{text-align:right;white-space:nowrap}
.wide{overflow-x:auto}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;background:var(--panel)}
summary{display:flex;gap:14px;align-items:baseline;padding:8px 14px;cursor:pointer}
summary .rule{font-weight:600;overflow-wrap:anywhere;white-space:pre-wrap}
summary .quiet{font-size:13px}
summary .number{margin-left:auto}
ul{list-style:none;margin:0;padding:0 14px 10px}
li{border-top:1px solid var(--line);padding:8px 0;break-inside:avoid}
.place{margin:0;font-size:12px}
.text{margin:2px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:2px;padding:0 1px}
pre{margin:0;padding:12px 14px;background:var(--panel);border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere}
@media print{body{font-size:11px}table,table.small{font-size:10px}th,td{padding:3px 5px}
main{max-width:none;padding:0}section{margin-top:16px;padding-top:10px}
.plots{grid-template-columns:1fr 1fr}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;height:auto}}
"""

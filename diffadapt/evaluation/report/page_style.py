"""The style sheet of evaluation pages, for phones, desktops and print."""

STYLE = """
:root { --ink: #1d2433; --faint: #6b7280; --line: #e2e5ea; --accent: #b4540a; --soft: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 16px 20px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 12px 0 4px; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 4px; }
p { margin: 4px 0 10px; }
.faint { color: var(--faint); font-size: .88rem; }
.stamp { background: var(--accent); color: #fff; padding: 10px 20px; font-weight: 700; text-align: center; }
.stamp span { font-weight: 400; }
.warnings { background: #fff6ec; border-left: 4px solid var(--accent); padding: 8px 14px; margin: 14px 0; }
.warnings ul { margin: 0; padding-left: 18px; }
ul.notes { padding-left: 18px; margin: 10px 0; color: var(--faint); font-size: .82rem; line-height: 1.4; }
ul.notes b { color: var(--ink); font-weight: 600; }
ul.notes li, .warnings li { overflow-wrap: anywhere; }
.warnings li { white-space: pre-line; }
a { color: #2b6cb0; }
code { font: .86em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--soft); padding: 2px 5px;
  border-radius: 4px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--faint); border-bottom: 2px solid var(--line); }
th, td { padding: 7px 12px 7px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
.table { overflow-x: auto; }
td.value { font-weight: 700; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.figure { font-variant-numeric: tabular-nums; }
td.remarks { color: var(--faint); font-size: .82rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 14px; }
.plots img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; padding: 8px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 14px 12px; }
.sheet.pairs { grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure .images { display: flex; gap: 4px; }
figure img { flex: 1 1 0; min-width: 0; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--soft); border: 1px solid var(--line); border-radius: 4px; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: .78rem; line-height: 1.3; color: var(--faint); overflow-wrap: anywhere;
  margin-top: 3px; }
details { border-bottom: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 3px 16px; font-size: .86rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 720px) {
  main { padding: 8px 14px 32px; }
  h1 { font-size: 1.35rem; }
  table.cards, table.cards tbody { display: block; }  /* else the longest name sets the width of all cards */
  table.cards thead { display: none; }
  table.cards tr { display: block; border: 1px solid var(--line); border-radius: 6px; padding: 6px 12px;
    margin: 10px 0; }
  table.cards td { display: flex; justify-content: space-between; gap: 14px; padding: 4px 0; border: 0;
    text-align: right; min-width: 0; overflow-wrap: anywhere; }
  table.cards td.value { white-space: normal; }
  table.cards td:empty { display: none; }
  table.cards td::before { content: attr(data-label); color: var(--faint); text-align: left; flex: none; }
  table.cards td.remarks { display: block; text-align: left; }
  table.cards td.remarks::before { content: none; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; }
}
@media print {
  .stamp { color: #000; border: 2px solid #000; }
  details { display: block; }
  table { font-size: .74rem; }
  td.figure { white-space: nowrap; }
  tr, figure, .plots img, ul.notes li, .warnings li { break-inside: avoid; }
  h1, h2, h3, h2 + p, h3 + p, summary { break-after: avoid; }
  .plots, .sheet { display: block; }  /* browsers do not keep the rows of a grid on one page */
  .plots img { display: inline-block; width: 48%; margin: 0 1% 8px 0; }
  .sheet figure { display: inline-block; vertical-align: top; width: 15.5%; margin: 0 .8% 8px 0; }
  .sheet.pairs figure { width: 23.5%; }
}
"""

"""How the page of the doctor looks, in light and dark."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --faint: #767676;
  --bad: #c0392b; --warn: #b7791f; --good: #2f7d4f; --bar: #4a7fb5; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .2rem; }
p { margin: .3rem 0 .8rem; } .lead { font-size: 1.05rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem;
  margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-left: 5px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; color: var(--faint); }
.tile b { display: block; font-size: 1.5rem; color: CanvasText; }
.tile.bad { border-left-color: var(--bad); } .tile.warn { border-left-color: var(--warn); }
.tile.good { border-left-color: var(--good); }
.tile.bad b { color: var(--bad); }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.split { white-space: nowrap; }
.wide { width: 360px; } .bar { height: .9rem; background: var(--bar); margin-top: .2rem; }
.grid { display: flex; flex-wrap: wrap; gap: .8rem; }
.pair { display: flex; flex-wrap: wrap; gap: .4rem; padding: .5rem; background: var(--soft);
  border-radius: 6px; width: 308px; }
.pair p { width: 100%; margin: 0; color: var(--faint); font-size: .85rem; }
figure { margin: 0; width: 150px; }
img, .none { width: 150px; height: 120px; object-fit: contain; background: var(--soft); }
.none { display: grid; place-items: center; color: var(--faint); }
figcaption { font-size: .78rem; color: var(--faint); overflow-wrap: anywhere; }
figcaption i { font-style: normal; border: 1px solid var(--line); border-radius: 4px;
  padding: 0 .25rem; }
code { font-size: .9em; overflow-wrap: anywhere; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
"""

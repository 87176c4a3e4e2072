// Numbers the elements of the page that is open, and says which of them can be seen. Runs inside the browser, called by
// worlds/browser.py before the layout is read; worlds/boxes.py makes boxes of both. An element can be seen when at
// least two of five spots in it (in its letters, where it has some of its own) are not covered by others.
//
// tallest: pixels of the page that count; still: a rule that stops all motion.
([tallest, still]) => {
  const root = document.documentElement, body = document.body;
  root.appendChild(document.createElement("style")).textContent = still;
  const height = Math.max(1, Math.min(tallest, root.scrollHeight));
  const clear = colour => /^rgba.*, 0(\.0\d*)?\)$|\/ 0(\.0\d*)?\)$/.test(colour);

  // The smallest rectangle around some others, cut at the page's edges: [x, y, width, height], or null for none.
  const around = rects => {
    const real = rects.filter(r => r.width > 0 && r.height > 0);
    const x = Math.max(0, Math.min(...real.map(r => r.left))), y = Math.max(0, Math.min(...real.map(r => r.top)));
    const w = Math.min(innerWidth, Math.max(...real.map(r => r.right))) - x;
    const h = Math.min(height, Math.max(...real.map(r => r.bottom))) - y;
    return w >= 1 && h >= 1 ? [x, y, w, h].map(Math.round) : null;
  };

  const describe = (el, number) => {
    const style = getComputedStyle(el), tag = el.tagName.toLowerCase(), field = ["input", "textarea"].includes(tag);
    el.setAttribute("data-nth", number);
    if (!el.checkVisibility({opacityProperty: true, visibilityProperty: true})) return null;
    const nodes = [...el.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    const typed = el.type === "password" ? "" : el.value || el.placeholder || "";
    const text = field ? typed.replace(/\s+/g, " ").trim() : "";
    const border = parseFloat(style.borderTopWidth) > 0 || parseFloat(style.borderLeftWidth) > 0;
    const solid = border || field || ["button", "select"].includes(tag) || !clear(style.backgroundColor);
    const range = document.createRange();
    const lines = nodes.flatMap(node => { range.selectNodeContents(node); return [...range.getClientRects()]; });
    const letters = around(nodes.length && !field ? lines : [el.getBoundingClientRect()]);
    if (!letters) return null;
    const part = el.closest("nav, header, footer, aside, form");
    return {el, number, part: part ? part.tagName.toLowerCase() : "", text, letters, solid, seen: 0};
  };

  scrollTo(0, 0);
  const found = body ? [body, ...body.querySelectorAll("*")].slice(0, 3000).map(describe).filter(box => box) : [];
  const spots = ({letters: [x, y, w, h]}) =>
    [[.5, .5], [.1, .5], [.9, .5], [.3, .2], [.7, .8]].map(([a, b]) => [x + a * w, y + b * h]);
  for (let top = 0; top < height; top += innerHeight) {  // only what is in the window can be asked for
    scrollTo(0, top);
    for (const box of found) for (const [x, y] of spots(box)) if (y >= top && y < top + innerHeight) {
      const hit = document.elementFromPoint(x - scrollX, y - scrollY);
      if (hit && (box.el.contains(hit) || (hit.contains(box.el) && !box.solid))) box.seen += 1;
    }
  }
  scrollTo(0, 0);
  const elements = found.filter(box => box.seen >= 2).map(({number, part, text}) => [String(number), {part, text}]);
  return {elements: Object.fromEntries(elements), height};
}

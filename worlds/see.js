// What a person sees of the page that is open. Runs inside the browser, called by worlds/browser.py; the record of a
// box is described at `Page` there. A box is an element with letters of its own, a colour that sets it off from what
// is behind it, a border, or a picture. It counts when at least two of five spots in it are not covered by others.
//
// tallest: pixels of the page that count; most: boxes at most (the largest); still: a rule that stops all motion.
([tallest, most, still]) => {
  const root = document.documentElement, body = document.body;
  root.appendChild(document.createElement("style")).textContent = still;
  const height = Math.max(1, Math.min(tallest, root.scrollHeight));

  const numbers = colour => (colour.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
  const painted = el => { const [, , , alpha = 1] = numbers(getComputedStyle(el).backgroundColor); return alpha > 0.05; };
  const colourOf = el => numbers(getComputedStyle(el).backgroundColor).slice(0, 3);
  const background = painted(root) ? colourOf(root) : body && painted(body) ? colourOf(body) : [255, 255, 255];
  const behind = el => { for (; el && el !== root; el = el.parentElement) if (painted(el)) return colourOf(el);
                         return background; };

  // The smallest rectangle around some others, cut at the page's edges: [x, y, width, height], or null for none.
  const around = rects => {
    const real = rects.filter(r => r.width > 0 && r.height > 0);
    const x = Math.max(0, Math.min(...real.map(r => r.left))), y = Math.max(0, Math.min(...real.map(r => r.top)));
    const w = Math.min(innerWidth, Math.max(...real.map(r => r.right))) - x;
    const h = Math.min(height, Math.max(...real.map(r => r.bottom))) - y;
    return w >= 1 && h >= 1 ? [x, y, w, h].map(Math.round) : null;
  };

  // How many of the same kind stand side by side.
  const inRow = (el, top) => Array.prototype.slice.call(el.parentElement.children, 0, 50).filter(other =>
    other.tagName === el.tagName && other.className === el.className
    && Math.abs(other.getBoundingClientRect().top - top) < 3).length;

  const describe = el => {
    const style = getComputedStyle(el), tag = el.tagName.toLowerCase(), field = ["input", "textarea"].includes(tag);
    if (!el.checkVisibility({opacityProperty: true, visibilityProperty: true})) return null;
    if (tag !== "svg" && el.closest("svg")) return null;
    const nodes = [...el.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    const typed = el.type === "password" ? "" : el.value || el.placeholder || "";
    const words = field ? typed : nodes.map(node => node.data.trim()).join(" ");
    const text = words.replace(/\s+/g, " ").slice(0, 500);
    const picture = ["img", "svg", "canvas", "hr"].includes(tag) || style.backgroundImage !== "none";
    const border = parseFloat(style.borderTopWidth) > 0 || parseFloat(style.borderLeftWidth) > 0;
    const under = el === body ? background : behind(el.parentElement);
    const solid = border || field || ["button", "select"].includes(tag) || String(behind(el)) !== String(under);
    if (!text && !picture && !solid) return null;
    const own = el.getBoundingClientRect(), range = document.createRange();
    const lines = nodes.flatMap(node => { range.selectNodeContents(node); return [...range.getClientRects()]; });
    const whole = around([own]), letters = nodes.length && !field ? around(lines) : whole;
    if (!whole || !letters) return null;
    const part = el.closest("nav, header, footer, aside, form");
    return {el, tag, part: part ? part.tagName.toLowerCase() : "", text, letters, solid, picture,
            rect: solid || picture ? whole : letters, back: behind(el), ink: numbers(style.color).slice(0, 3),
            font: parseFloat(style.fontSize), row: el === body ? 1 : inRow(el, own.top), seen: 0,
            clear: (numbers(style.webkitTextFillColor)[3] ?? 1) < 0.1 && style.webkitBackgroundClip !== "text"};
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
  const boxes = found.filter(box => box.seen >= 2).map(({el, seen, clear, ...box}) =>
    ({...box, text: clear ? "" : box.text}));
  const area = box => box.rect[2] * box.rect[3];
  const least = boxes.map(area).sort((a, b) => b - a)[most - 1] || 0;
  return {boxes: boxes.filter(box => area(box) >= least).slice(0, most), background, height};
}

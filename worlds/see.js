// Numbers the elements of the page that is open, and says which of them can be seen. Runs inside the browser, called by
// worlds/browser.py before the layout is read; worlds/boxes.py makes boxes of both. An element can be seen when at
// least two of five spots in it (in its letters, where it has some of its own) are not covered by others.
//
// tallest: pixels of the page that count.
tallest => {
  const root = document.documentElement, body = document.body;
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

  // The words that a person reads in a field.
  const unread = ["checkbox", "radio", "hidden", "color", "range", "file", "image"];
  const typed = el => {
    if (el.tagName === "SELECT") return el.multiple || el.size > 1 ? "" : el.selectedOptions[0]?.label ?? "";
    if (unread.includes(el.type)) return "";
    const label = {submit: "Submit", reset: "Reset"}[el.type] ?? el.placeholder;
    return el.value ? (el.type === "password" ? "" : el.value) : label;
  };

  // What has no box of its own (display: contents) is there if what it stands in is.
  const shown = el => getComputedStyle(el).display === "contents" ? shown(el.parentElement)
    : el.checkVisibility({opacityProperty: true, visibilityProperty: true});

  // Does an element hide what lies under it? Through a thin colour one sees: there the pixels decide.
  const covers = el => {
    const {backgroundColor, backgroundImage} = getComputedStyle(el);
    const picture = /url\(|gradient/.test(backgroundImage) && !/rgba|\/ [\d.]+\)/.test(backgroundImage);
    const opaque = !/^rgba|\/ [\d.]+\)$/.test(backgroundColor);
    return shown(el) && (opaque || picture || /^(img|canvas|input|textarea|select)$/i.test(el.tagName));
  };

  const describe = (el, number) => {
    const style = getComputedStyle(el), tag = el.tagName.toLowerCase();
    const field = ["input", "textarea", "select"].includes(tag);
    el.setAttribute("data-nth", number);
    if (!shown(el)) return null;
    const nodes = [...el.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    const text = field ? typed(el).replace(/\s+/g, " ").trim() : "";
    const border = parseFloat(style.borderTopWidth) > 0 || parseFloat(style.borderLeftWidth) > 0;
    const solid = border || field || tag === "button" || !clear(style.backgroundColor);
    const range = document.createRange();
    const lines = nodes.flatMap(node => { range.selectNodeContents(node); return [...range.getClientRects()]; });
    const letters = around(nodes.length && !field ? lines : [el.getBoundingClientRect()]);
    if (!letters) return null;
    const part = el.closest("nav, header, footer, aside, form");
    return {el, number, part: part ? part.tagName.toLowerCase() : "", text, letters, solid, seen: 0};
  };

  // What cannot be hit covers all the same. What stays in the window when a page scrolls stays where the picture shows
  // it, which is taken at the top of the page.
  scrollTo(0, 0);
  const held = [];
  for (const el of document.querySelectorAll("*")) {
    const {position, pointerEvents, translate} = getComputedStyle(el);
    if (pointerEvents === "none") el.style.setProperty("pointer-events", "auto", "important");
    if (el.inert) el.inert = false;
    if (!["fixed", "sticky"].includes(position)) continue;
    const [x, y = "0px"] = translate === "none" ? ["0px"] : translate.split(" ");
    held.push({el, x, y, top: el.getBoundingClientRect().top, moved: 0});
  }
  const hold = down => {
    for (const one of held) {
      const off = one.top - down - one.el.getBoundingClientRect().top;
      one.moved += off;
      if (off) one.el.style.setProperty("translate", `${one.x} calc(${one.y} + ${one.moved}px)`, "important");
    }
  };
  const found = body ? [body, ...body.querySelectorAll("*")].slice(0, 3000).map(describe).filter(box => box) : [];
  const spots = ({letters: [x, y, w, h]}) =>
    [[.5, .5], [.1, .5], [.9, .5], [.3, .2], [.7, .8]].map(([a, b]) => [x + a * w, y + b * h]);
  for (let top = 0; top < height; top += innerHeight) {  // only what is in the window can be asked for
    scrollTo(0, top);
    hold(scrollY);
    for (const box of found) for (const [x, y] of spots(box)) if (y >= top && y < top + innerHeight) {
      const at = [x - scrollX, y - scrollY], hit = document.elementFromPoint(...at);
      if (!hit) continue;
      if (box.el.contains(hit) || (hit.contains(box.el) && !box.solid)) box.seen += 1;
      else if (box.el.contains(document.elementsFromPoint(...at).find(el => box.el.contains(el) || covers(el))))
        box.seen += 1;
    }
  }
  scrollTo(0, 0);
  hold(0);
  const elements = found.filter(box => box.seen >= 2).map(({number, part, text}) => [String(number), {part, text}]);
  return {elements: Object.fromEntries(elements), height};
}

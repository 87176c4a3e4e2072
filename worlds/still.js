// Brings the page that is open to rest, so that each drawing of it is the same. Runs inside the browser, called by
// worlds/browser.py, which has pictures that move, <marquee> and the motion that SVG describes stand at their start.
//
// What ends is shown as it ends: a page that fades in is there, a splash that fades out is gone. What goes on for ever
// is shown as it would be without moving or, where nothing would be seen of it then, as it begins, or else half-way
// through a round.
async () => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(`*, ::before, ::after {transition: none !important; caret-color: transparent !important;
    scroll-behavior: auto !important} noscript {display: none !important}`);
  document.adoptedStyleSheets = [sheet];

  for (const el of document.querySelectorAll("*")) {  // what is drawn when it comes into the window is drawn
    if (getComputedStyle(el).contentVisibility !== "auto") continue;
    el.style.setProperty("content-visibility", "visible", "important");
  }

  const seen = ({target, pseudoElement}) => {
    if (!target) return true;
    const {opacity, visibility} = getComputedStyle(target, pseudoElement);
    const {width, height} = target.getBoundingClientRect();
    return target.checkVisibility({opacityProperty: true}) && visibility === "visible" && opacity > 0.1
      && width * height > 9;
  };
  const goesOn = ({timeline, effect}) =>
    timeline !== document.timeline || effect.getComputedTiming().endTime === Infinity;
  for (let round = 0; round < 3; round += 1) {  // the end of one may be the start of another
    const motions = document.getAnimations().filter(motion => motion.effect && motion.playState !== "paused");
    for (const motion of motions) {
      if (goesOn(motion)) motion.cancel();
      else motion.finish();
    }
    for (const motion of motions.filter(motion => goesOn(motion) && !seen(motion.effect))) {
      motion.timeline = document.timeline;
      motion.pause();
      motion.currentTime = 1;
      if (seen(motion.effect)) continue;
      motion.effect.updateTiming({delay: 0, duration: 1000});
      motion.currentTime = 500;
    }
  }

  for (const motion of document.querySelectorAll("set, animate, animateTransform")) {
    const [name, type, values, to, fill, count, begin, length] = ["attributeName", "type", "values", "to", "fill",
      "repeatCount", "begin", "dur"].map(key => motion.getAttribute(key));
    const stays = motion.tagName === "set" && !length || fill === "freeze" && count !== "indefinite";
    const last = values?.split(";").map(value => value.trim()).filter(value => value).at(-1) ?? to;
    const el = motion.targetElement;
    if (!el || !/^[\w:-]+$/.test(name) || !last || !stays || /indefinite|click|mouse|focus|key|activate/.test(begin)) continue;
    if (motion.tagName === "animateTransform") el.setAttribute(name, `${type ?? "translate"}(${last})`);
    else if (CSS.supports(name, last)) el.style.setProperty(name, last, "important");
    else el.setAttribute(name, last);
  }
  for (const bar of document.querySelectorAll("progress:indeterminate")) bar.value = 0;
  if (document.fonts.status === "loading") await document.fonts.ready;
}

"use strict";
// Pointing at a stage of the strip, tapping it or moving the slider shows what the tables have on it.
(() => {
  const strip = document.getElementById("strip");
  const scroller = strip.closest(".scroll");
  const cursor = document.getElementById("cursor");
  const detail = document.getElementById("detail");
  const choice = document.getElementById("choice");
  const chosen = document.getElementById("chosen");
  const count = Number(strip.dataset.count);
  let shown = -1;

  function element(name, ...content) {
    const made = document.createElement(name);
    made.append(...content);
    return made;
  }

  // On a narrow screen the strip scrolls to the stage that was chosen elsewhere.
  function follow(index) {
    const width = strip.getBoundingClientRect().width;
    const middle = ((index + 0.5) / count) * width;
    scroller.scrollLeft = middle - scroller.clientWidth / 2;
  }

  function show(index, pointed) {
    if (index === shown) return;
    shown = index;
    const rows = document.getElementById(`stage-${index}`);
    const head = rows.querySelector("th");
    const table = element("table", document.querySelector("#all thead").cloneNode(true), rows.cloneNode(true));
    table.tBodies[0].removeAttribute("id");
    table.tBodies[0].rows[0].remove();
    const title = element("h3", "Stage ", ...[...head.childNodes].map((node) => node.cloneNode(true)));
    const parts = [title, table];
    const next = document.querySelector(`#kind-${rows.dataset.kind} .next`);
    if (next && next.textContent.trim()) {
      const link = element("a", "all layouts");
      link.href = `#kind-${rows.dataset.kind}`;
      link.addEventListener("click", () => { document.querySelector(link.getAttribute("href")).open = true; });
      const text = next.textContent.trim();
      parts.push(element("p", text[0].toUpperCase() + text.slice(1) + " — ", link));
    }
    detail.replaceChildren(...parts);
    chosen.textContent = String(index);
    cursor.setAttribute("x", String(index));
    cursor.setAttribute("visibility", "visible");
    if (!pointed) follow(index);
  }

  function at(event) {
    const box = strip.getBoundingClientRect();
    return Math.min(count - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * count)));
  }

  strip.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") show(at(event), true); });
  strip.addEventListener("pointerleave", () => show(Number(choice.value), true));
  strip.addEventListener("click", (event) => { choice.value = String(at(event)); show(at(event), true); });
  choice.addEventListener("input", () => show(Number(choice.value)));

  document.getElementById("chooser").hidden = false;
  detail.hidden = false;
  show(0);
})();

"use strict";
// Shows what is behind a cell when it is pointed at, focused or tapped. Arrow keys move, Escape closes.
(() => {
  const tip = document.getElementById("tip");
  const probability = (value) => (value > 0 && value < 0.0005 ? "<0.001" : value.toFixed(3));

  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text; // never markup: tokens may hold anything
    return element;
  };

  const line = (label, value, share, className) => {
    const item = make("li", className);
    const track = make("span", "track");
    const bar = make("i");
    bar.style.width = (100 * Math.min(1, share)).toFixed(1) + "%";
    track.append(bar);
    item.append(label, track, make("span", "", probability(value)));
    return item;
  };

  const fill = (cell) => {
    const map = cell.closest(".map");
    const row = Number(cell.dataset.row), column = Number(cell.dataset.column);
    const { tokens, rows } = map.details;
    const entry = rows[row][column];
    const head = map.querySelectorAll("thead th[scope=col]")[column];
    const layer = cell.parentElement.firstElementChild.dataset.layer;

    const title = make("p", "");
    const next = make("p", "");
    title.append("Layer " + layer + ", position " + head.dataset.position + ", after ", make("span", "token", head.dataset.token));
    const found = entry.rank === undefined
      ? " is not among the kept tokens: at most " + probability(entry.next)
      : " has " + probability(entry.next) + ", rank " + entry.rank;
    next.append("True next token ", make("strong", "token", head.dataset.next), found);

    const list = make("ul");
    entry.top.forEach(([number, value], index) => {
      list.append(line(make("span", "token", tokens[number]), value, value, index + 1 === entry.rank ? "true" : ""));
    });
    if (entry.others) {
      const [count, mass] = entry.others;
      list.append(line(make("span", "", count + " more kept"), mass, mass, "whole"));
    }
    list.append(line(make("span", "", "rest"), entry.rest, entry.rest, "whole"));
    const foot = make("p", "foot");
    foot.append(make("span", "", "entropy"), make("span", "", "at least " + entry.entropy.toFixed(2) + " nats"));
    tip.replaceChildren(title, next, list, foot);
  };

  const place = (cell) => {
    const box = cell.getBoundingClientRect();
    const width = document.documentElement.clientWidth, height = window.innerHeight;
    const left = Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8));
    const below = box.bottom + 8;
    const fits = below + tip.offsetHeight < height || box.top < tip.offsetHeight + 8;
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = (fits ? below : box.top - tip.offsetHeight - 8) + window.scrollY + "px";
  };

  let shown = null; // the cell that the tip is about
  const show = (cell) => {
    shown = cell;
    fill(cell);
    tip.hidden = false;
    place(cell);
  };
  const hide = () => {
    shown = null;
    tip.hidden = true;
  };
  // Focus scrolls a cell into view: the tip goes with it, and away when the cell is scrolled out of its frame.
  const follow = (map) => {
    if (!shown) return;
    const box = shown.getBoundingClientRect(), frame = map.getBoundingClientRect();
    if (box.right < frame.left || box.left > frame.right) hide();
    else place(shown);
  };
  const cellAt = (map, row, column) => map.querySelector(`td[data-row="${row}"][data-column="${column}"]`);

  const go = (cell) => {
    for (const other of cell.closest(".map").querySelectorAll('td[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
    keepClearOfTheLabels(cell);
    show(cell);
  };

  // The layer labels stay at the left edge and would cover a cell that was scrolled only just into view.
  const keepClearOfTheLabels = (cell) => {
    const map = cell.closest(".map"), labels = cell.parentElement.firstElementChild;
    const hidden = labels.getBoundingClientRect().right - cell.getBoundingClientRect().left;
    if (hidden > 0) map.scrollLeft -= hidden + 4;
  };

  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  for (const map of document.querySelectorAll(".map")) {
    map.details = JSON.parse(document.getElementById(map.dataset.details).textContent);
    const cellOf = (event) => event.target.closest("td[data-row]");
    map.addEventListener("mouseover", (event) => { const cell = cellOf(event); if (cell) show(cell); });
    map.addEventListener("mouseleave", hide);
    map.addEventListener("focusin", (event) => { const cell = cellOf(event); if (cell) show(cell); });
    map.addEventListener("focusout", hide);
    const tellMore = () => {
      const hidden = map.scrollWidth - map.clientWidth - map.scrollLeft;
      map.parentElement.classList.toggle("more", hidden > 4);
    };
    map.addEventListener("scroll", () => { follow(map); tellMore(); }, { passive: true });
    window.addEventListener("resize", tellMore);
    tellMore();
    map.addEventListener("click", (event) => { const cell = cellOf(event); if (cell) go(cell); });
    map.addEventListener("keydown", (event) => {
      const cell = cellOf(event);
      if (!cell) return;
      const row = Number(cell.dataset.row), column = Number(cell.dataset.column);
      const last = cell.parentElement.querySelectorAll("td").length - 1;
      let target = null;
      if (event.key in moves) target = cellAt(map, row + moves[event.key][0], column + moves[event.key][1]);
      else if (event.key === "Home") target = cellAt(map, row, 0);
      else if (event.key === "End") target = cellAt(map, row, last);
      else return;
      event.preventDefault();
      if (target) go(target);
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
})();

// The page of cacovid_kernels.viz.report: draws what the record holds.
"use strict";
const byId = id => document.getElementById(id);
const record = JSON.parse(byId("record").textContent);
const [T, H, W] = record.grid, perFrame = H * W, N = T * perFrame;
const count = n => n.toLocaleString("en");
const percent = share => `${(100 * share).toFixed(1)}%`;
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const text = (id, value) => { byId(id).textContent = value; };

// What is kept: masks of N cells, 0 or 1.
const given = record.selections.map(packed => {
  const bits = bytes(packed);
  return Uint8Array.from({length: N}, (_, i) => bits[i >> 3] >> (i & 7) & 1);
});
const sum = mask => mask.reduce((total, cell) => total + cell, 0);
const scores = record.scores && new Float32Array(bytes(record.scores).buffer);
const rank = scores && ranks(scores);

function ranks(values) {  // place of every token, best first: NaN last, equal scores by index
  const order = Uint32Array.from(values, (_, i) => i).sort((a, b) =>
    Number.isNaN(values[a]) - Number.isNaN(values[b]) || (values[a] < values[b]) - (values[a] > values[b]) || a - b);
  const places = new Uint32Array(N);
  order.forEach((token, place) => { places[token] = place; });
  return places;
}
function best(ratio) {  // topk_tokens(scores, keep_ratio=ratio); the order of the product decides how it rounds
  const k = Math.max(1, Math.floor(ratio * H * W * T));
  return Uint8Array.from(rank, place => place < k);
}

// The page's parts, one per frame.
const second = s => s < 60 ? `${s.toFixed(2)} s` : `${Math.floor(s / 60)}:${(s % 60).toFixed(1).padStart(4, "0")}`;
const when = t => record.timestamps ? second(record.timestamps[t]) : `frame ${t}`;
const figures = record.frames.map((source, t) => {
  const figure = byId("tile").content.cloneNode(true).querySelector("figure");
  const frame = figure.querySelector(".frame"), heat = figure.querySelector(".heat");
  figure.querySelector("svg").setAttribute("viewBox", `0 0 ${W} ${H}`);
  figure.querySelector("span").textContent = record.timestamps ? `${t} · ${when(t)}` : when(t);
  frame.src = source;
  frame.alt = `Frame ${t}`;
  if (scores) [heat.src, heat.hidden] = [record.heat[t], false];
  figure.addEventListener("click", () => choose(t));
  figure.addEventListener("pointermove", event => point(t, event));
  byId("frames").append(figure);
  return figure;
});
const bars = figures.map((_, t) => {
  const bar = document.createElement("button");
  bar.type = "button";
  bar.tabIndex = t ? -1 : 0;  // one stop of the Tab key; arrows move on
  bar.addEventListener("click", () => choose(t, true));
  byId("bars").append(bar);
  return bar;
});
const even = byId("bars").appendChild(document.createElement("div"));
even.className = "even";
for (let t = 0; t < T; t += Math.ceil(T / 5)) {
  const tick = byId("ticks").appendChild(document.createElement("span"));
  tick.textContent = when(t);
  tick.style.setProperty("--place", `${100 * (t + .5) / T}%`);
}

function paths(mask, t) {  // dropped cells as runs of a row, and the border between kept and dropped
  const at = (y, x) => y >= 0 && y < H && x >= 0 && x < W && mask[t * perFrame + y * W + x] === 1;
  let dim = "", edge = "";
  for (let y = 0; y <= H; y++) for (let x = 0; x <= W; x++) {
    if (y < H && x < W && !at(y, x)) {
      let end = x + 1;
      if (x === 0 || at(y, x - 1)) {
        while (end < W && !at(y, end)) end++;
        dim += `M${x} ${y}H${end}V${y + 1}H${x}z`;
      }
    }
    if (x < W && at(y, x) !== at(y - 1, x)) edge += `M${x} ${y}h1`;
    if (y < H && at(y, x) !== at(y, x - 1)) edge += `M${x} ${y}v1`;
  }
  return [dim, edge];
}
function draw(mask, note) {
  const counts = figures.map((_, t) => sum(mask.subarray(t * perFrame, (t + 1) * perFrame)));
  const kept = sum(mask), most = Math.max(...counts), tallest = Math.max(1, most);
  figures.forEach((figure, t) => {
    const [dim, edge] = paths(mask, t), [inside, ...borders] = figure.querySelectorAll("path");
    inside.setAttribute("d", dim);
    borders.forEach(border => border.setAttribute("d", edge));
    figure.querySelector("b").textContent = `${counts[t]} kept`;
    bars[t].style.setProperty("--height", `${100 * counts[t] / tallest}%`);
    const label = `${record.timestamps ? `frame ${t}, ` : ""}${when(t)}: ${counts[t]} of ${perFrame} tokens kept`;
    bars[t].setAttribute("aria-label", label);
    bars[t].title = label;
  });
  even.style.setProperty("--height", `${100 * kept / T / tallest}%`);
  text("kept", `${count(kept)} of ${count(N)} (${percent(kept / N)})`);
  text("most", `${most} of ${perFrame}`);
  text("none", count(counts.filter(n => n === 0).length));
  text("top", `Kept per frame, up to ${most}; dashed: even share ${(kept / T).toFixed(1)}`);
  text("note", note);
}
function choose(t, scroll = false) {
  [...figures, ...bars].forEach(part => part.removeAttribute("aria-current"));
  [figures[t], bars[t]].forEach(part => part.setAttribute("aria-current", "true"));
  bars.forEach((bar, i) => { bar.tabIndex = i === t ? 0 : -1; });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (scroll) figures[t].scrollIntoView({block: "nearest", behavior: calm ? "auto" : "smooth"});
}
function point(t, event) {  // says which token is under the pointer
  const box = figures[t].querySelector(".picture").getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left) / box.width * W);
  const y = Math.floor((event.clientY - box.top) / box.height * H);
  if (x < 0 || y < 0 || x >= W || y >= H) return;
  const token = t * perFrame + y * W + x;
  const score = scores ? `: score ${scores[token].toPrecision(3)}, rank ${count(rank[token] + 1)}` : "";
  text("where", `frame ${t}, row ${y}, column ${x}${score}`);
}
byId("bars").addEventListener("keydown", event => {
  const now = bars.indexOf(document.activeElement);
  const next = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: T - 1}[event.key];
  if (now < 0 || next === undefined) return;
  event.preventDefault();
  if (!bars[next]) return;
  bars[next].focus();
  choose(next, true);
});

// The slider: through the given selections, or in thousandths of the tokens.
const slider = byId("slider"), number = byId("number");
function show(mask, note, position) {
  slider.value = position;
  slider.setAttribute("aria-valuetext", `${percent(sum(mask) / N)}, ${count(sum(mask))} tokens`);
  number.value = (position / 10).toFixed(1);
  draw(mask, note);
}
function showGiven() {
  byId("back").disabled = true;
  show(given[0], rank ? "The selection as it was given." : "", Math.max(1, Math.round(1000 * sum(given[0]) / N)));
}
function showBest(thousandths) {
  const mask = best(thousandths / 1000), shared = mask.filter((cell, i) => cell && given[0][i]).length;
  byId("back").disabled = false;
  const note = `The ${count(sum(mask))} best scores of the whole video; ${count(shared)} of them are in the given ` +
    `selection, which has ${count(sum(given[0]))}.`;
  show(mask, note, thousandths);
}
if (given.length > 1) {
  const rising = given.map((mask, i) => [sum(mask), i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, i]) => i);
  const showOne = place => show(given[rising[place]], `Selection ${place + 1} of ${given.length}, as given.`, place);
  [slider.min, slider.max] = [0, given.length - 1];
  slider.addEventListener("input", () => showOne(Number(slider.value)));
  byId("percent").hidden = byId("back").hidden = true;
  text("rule", "The slider goes through the selections that were given.");
  showOne(rising.indexOf(0));
} else {
  [slider.min, slider.max] = [1, 1000];
  slider.addEventListener("input", () => showBest(Number(slider.value)));
  number.addEventListener("change", () => showBest(Math.min(1000, Math.max(1, Math.round(10 * Number(number.value))))));
  byId("back").addEventListener("click", showGiven);
  if (rank) text("rule", "The slider keeps the best scores of the whole video, as topk_tokens does: equal scores go " +
    "to the lower index. A selection with a budget per frame would look different at another ratio.");
  showGiven();
}
byId("ratio").hidden = given.length === 1 && !rank;

// What does not change.
document.documentElement.style.setProperty("--tile", T <= 12 ? "17rem" : T <= 40 ? "12.5rem" : "10rem");
document.documentElement.style.setProperty("--aspect", record.size.join(" / "));
document.documentElement.style.setProperty("--grain", record.size[0] < 160 ? "pixelated" : "auto");
text("grid", `${T} of ${H} × ${W}`);
if (record.question !== null) [byId("question").textContent, byId("question").hidden] = [record.question, false];
for (const [who, answer] of record.answers) {
  const entry = byId("answers").appendChild(document.createElement("div"));
  entry.appendChild(document.createElement("dt")).textContent = who;
  entry.appendChild(document.createElement("dd")).textContent = answer;
  byId("answers").hidden = false;
}
function warm() { document.documentElement.style.setProperty("--heat", byId("heat").value / 100); }
byId("heat").addEventListener("input", warm);
warm();
if (scores) {
  const [low, colours, high] = record.scale;
  text("low", low);
  text("high", high);
  byId("scale").src = colours;
  byId("warmth").hidden = false;
}

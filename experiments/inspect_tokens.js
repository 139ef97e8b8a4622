"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const make = (tag, name = "", text = "") => Object.assign(document.createElement(tag),
  { className: name, textContent: text });
const flat = data.groups.flatMap((group) => group.answers);
const quantity = Object.fromEntries(data.quantities.map((q) => [q.key, q]));
const digits = (x) => x === null ? "not finite" : x === 0 ? "0" : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ?
  x.toExponential(2) : String(Number(x.toPrecision(4)));
const number = (x) => digits(x).replaceAll("-", "−");
const signed = (x, form = number) => (x > 0 ? "+" : "") + form(x);
const brief = (x) => x === null || !isFinite(x) ? number(null) : Math.abs(x) < 1e-6 ? "0" :
  number(Number(x.toPrecision(3)));
const percent = (x) => x === null ? "none" : (100 * x).toFixed(x && x < .1 ? 1 : 0) + " %";
const short = (text) => text.length > 200 ? text.slice(0, 200) + " …" : text;
const mean = (values) => values.length ? values.reduce((sum, x) => sum + x, 0) / values.length : null;  // of nothing
const finite = (values) => values.filter((x) => x !== null);
const column = (key) => finite(flat.flatMap((a) => a.columns[key]));
let chosen = data.quantities[0], layer = 0, scale = 1, pinned = false, current = null;

// ---- colours: a hue by the sign or the expert, its strength by the size

const SIZE = { ratio: Math.log, logp: (x) => -x };  // what the scale measures, where it is not the number itself
const sized = (x) => SIZE[chosen.key] ? SIZE[chosen.key](x) : x;
const tint = (name, share) => `rgb(var(--${name}) / ${(.62 * Math.min(1, share) ** .7).toFixed(3)})`;
const hue = (expert) => `hsl(${Math.round(expert * 137.508) % 360} 70% 55% / .5)`;
function colour(columns, i) {
  const x = columns[chosen.key][i];
  if (chosen.kind === "experts") return x[layer][0] < 0 ? "" : hue(x[layer][0]);
  if (x === null) return "";
  if (chosen.kind === "flag") return x ? tint("flag", 1) : "";
  const size = sized(x) / scale;
  return tint(chosen.kind === "sequential" ? "strong" : size < 0 ? "low" : "high", Math.abs(size));
}
function measure() {  // 99 % of the numbers are within the scale: a few large ones would leave the others pale
  if (chosen.kind === "flag" || chosen.kind === "experts") return;
  const sizes = column(chosen.key).map((x) => Math.abs(sized(x))).filter(isFinite).sort((a, b) => a - b);
  scale = Math.max(1e-6, sizes[Math.floor(.99 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1);  // not rounding
}
function legend() {
  const box = find("scale");
  find("meaning").textContent = chosen.meaning;
  box.replaceChildren();
  const label = (text, shade) => { const b = make("b", "", text); b.style.background = shade; box.append(b); };
  if (chosen.kind === "flag") { label("clipped", tint("flag", 1)); box.append("the others have a gradient"); return; }
  if (chosen.kind === "experts") {
    const all = column("experts"), select = make("select");
    (all[0] || []).forEach((_, n) => select.append(make("option", "", `MoE layer ${n + 1}`)));
    select.selectedIndex = layer;
    select.setAttribute("aria-label", "layer");
    select.onchange = () => { layer = select.selectedIndex; paint(); find("scale").querySelector("select").focus(); };
    box.append(select);
    const counts = {};  // -1: not recorded
    all.forEach((token) => { counts[token[layer][0]] = (counts[token[layer][0]] || 0) + 1; });
    delete counts[-1];
    Object.entries(counts).slice(0, 32).forEach(([e, n]) => label(`${e}: ${percent(n / all.length)}`, hue(+e)));
    return;
  }
  const bar = make("i"), ends = chosen.kind === "sequential" ? [0, scale] : [-scale, scale];
  const shown = chosen.key === "ratio" ? ends.map(Math.exp) : chosen.key === "logp" ? [0, -scale] : ends;
  const shades = (name, stops) => stops.map((share) => tint(name, share)), up = [0, .25, .5, .75, 1];
  bar.style.background = `linear-gradient(90deg, ${chosen.kind === "sequential" ? shades("strong", up) :
    [...shades("low", up.slice().reverse()), ...shades("high", up.slice(1))]})`;
  box.append(number(shown[0]), bar, number(shown[1]));
}
function paint() {
  measure();
  for (const answer of flat) answer.spans.forEach((span, i) => { span.style.background = colour(answer.columns, i); });
  legend();
  document.querySelectorAll("#quantities [role=radio]").forEach((b) => check(b, b.dataset.key === chosen.key));
}

// ---- tokens and answers

const SIGN = { " ": "·", "\n": "↵", "\t": "→" };
const SPACE = { " ": "space", "\n": "newline", "\t": "tab" };
function token(piece) {
  const [text, , , special] = data.pieces[piece], span = make("span", "t");
  if (special) span.classList.add("special");
  if (/^‹.*›$/.test(text)) span.classList.add("part");
  for (const part of text.split(/(‹[^›]*›|[ \n\t])/)) {  // the blanks between bytes are not the model's
    if (SPACE[part]) span.append(make("i", SPACE[part], part)); else if (part) span.append(part);
  }
  return span;
}
function answerNode(group, answer) {
  const node = make("article", "answer"), side = make("div", "side"), box = make("div", "tokens");
  const mark = { right: "✓ right", wrong: "✗ wrong", unjudged: "? unjudged" }[answer.verdict];
  const share = answer.columns.clipped ? mean(answer.columns.clipped) : 0;
  const notes = [`reward ${brief(answer.reward)}`, `advantage ${signed(mean(finite(answer.columns.advantage)), brief)}`,
    `${answer.tokens.length} tokens`];
  if (share) notes.push(`${percent(share)} clipped`);
  if (!answer.format) notes.push("badly formed");
  if (answer.truncated) notes.push(data.masked ? "truncated, not in the loss" : "truncated");
  side.append(make("b", answer.verdict, mark), ...notes.map((note) => make("span", "", note)));
  if (answer.reason) side.title = answer.reason;
  answer.spans = answer.tokens.map((piece, i) => {
    const span = token(piece);
    if (answer.columns.clipped && answer.columns.clipped[i]) span.classList.add("clipped");
    span.at = [answer, i];
    return span;
  });
  box.append(...answer.spans);
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `tokens of answer ${answer.number}, ${answer.verdict}; arrow keys move`);
  box.answer = answer;
  node.append(side, box);
  answer.node = node;
  answer.text = (group.prompt + "\n" + answer.tokens.map((p) => data.pieces[p][0]).join("")).toLowerCase();
  return node;
}
const rewards = flat.map((a) => a.reward), lowest = Math.min(0, ...rewards), highest = Math.max(...rewards);
function groupNode(group) {
  const node = make("section", "group"), head = make("div", "head"), words = make("div"), strip = make("div", "strip");
  const judged = group.answers.filter((a) => a.verdict !== "unjudged");
  const right = judged.filter((a) => a.verdict === "right").length;
  const about = [`problem ${group.number}`, `${right} of ${judged.length} right`,
    `mean reward ${brief(mean(group.answers.map((a) => a.reward)))}`];
  if (group.reference) about.push(`reference ${short(group.reference)}`);
  words.append(make("h2", "", group.prompt), make("p", "", about.join(" · ")));
  for (const answer of group.answers) {
    const button = make("button", answer.verdict), rod = make("i");
    button.type = "button";
    button.title = `answer ${answer.number}: ${answer.verdict}, reward ${number(answer.reward)}`;
    button.setAttribute("aria-label", button.title);
    rod.style.height = `${100 * (answer.reward - lowest) / (highest - lowest || 1)}%`;
    button.append(rod);
    button.onclick = () => {
      answer.node.scrollIntoView({ block: "center", behavior: "smooth" });
      answer.node.classList.add("flash");
      setTimeout(() => answer.node.classList.remove("flash"), 1500);
    };
    strip.append(button);
  }
  head.append(words, strip);
  const prompt = make("details"), box = make("div", "tokens");
  prompt.append(make("summary", "", `prompt as the model sees it, ${group.tokens.length} tokens`), box);
  box.append(...group.tokens.map(token));
  node.append(head, prompt, ...group.answers.map((answer) => answerNode(group, answer)));
  group.node = node;
  return node;
}

// ---- the numbers of one token

function rows(answer, i) {
  const chance = (x) => x === null ? number(x) : `${number(x)} (${percent(Math.exp(x))})`, list = [];
  const add = (key, name, form) => { if (answer.columns[key]) list.push([key, name, form(answer.columns[key][i])]); };
  add("advantage", "advantage A", signed);
  add("logp", "log π_old", chance);
  add("updated_logp", "log π_θ, after the step", chance);
  add("ratio", "ratio π_θ / π_old", number);
  add("clipped", "clip", (x) => x ? "clipped: no gradient" : "not clipped");
  add("ref_logp", "log π_ref", chance);
  add("kl", "KL to π_ref, k3", number);
  add("entropy", "entropy", (x) => `${number(x)} nats`);
  add("value", "value V", number);
  add("returns", "return R", number);
  add("value_error", "value error R − V", signed);
  const routed = answer.columns.experts ? answer.columns.experts[i] : [];
  routed.forEach((e, n) => list.push(["experts", `experts, MoE layer ${n + 1}`, e[0] < 0 ? "not recorded" : e.join(", ")]));
  return list;
}
function show(span) {
  const [answer, i] = span.at, [text, id, bytes] = data.pieces[answer.tokens[i]];
  const tip = find("tip"), table = make("table");
  if (current) current.classList.remove("on");
  (current = span).classList.add("on");
  for (const [key, name, value] of rows(answer, i)) {
    const row = make("tr", key === chosen.key ? "chosen" : "");
    row.append(make("td", "", name), make("td", "", value));
    table.append(row);
  }
  const spelt = short(text.replace(/‹[^›]*›|[ \n\t]/g, (part) => SIGN[part] || part));
  const pairs = bytes.match(/../g) || [], listed = pairs.slice(0, 12).join(" ") + (pairs.length > 12 ? " …" : "");
  const about = `token ${i + 1} of ${answer.tokens.length} · id ${id} · bytes ${listed}`;
  tip.replaceChildren(make("strong", "", spelt), make("p", "", about), table);
  tip.hidden = false;
  const box = span.getClientRects()[0], size = tip.getBoundingClientRect();
  const below = box.bottom + 8 + size.height < innerHeight, left = Math.min(box.left, innerWidth - size.width - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)}px`;
}
function hide() {
  if (current) current.classList.remove("on");
  current = null;
  pinned = false;
  find("tip").hidden = true;
}
const spanOf = (event) => event.target.closest ? event.target.closest(".answer .t") : null;
document.addEventListener("mouseover", (event) => {
  if (!pinned) { const span = spanOf(event); if (span) show(span); else hide(); }
});
document.addEventListener("click", (event) => {
  const span = spanOf(event);
  hide();
  if (span) { span.closest(".tokens").focus({ preventScroll: true }); show(span); pinned = true; }
});
document.addEventListener("scroll", () => { if (current) show(current); }, { passive: true });
document.addEventListener("focusout", (event) => { if (event.target.answer) hide(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  const answer = event.target.answer, move = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
  if (!answer || !move) return;
  event.preventDefault();
  if (!answer.spans.length) return;
  const last = answer.spans.length - 1, from = current && current.at[0] === answer ? current.at[1] : -1;
  const i = Math.max(0, Math.min(last, from + move));
  answer.spans[i].scrollIntoView({ block: "nearest" });
  show(answer.spans[i]);
  pinned = true;
  const row = rows(answer, i).find(([key]) => key === chosen.key);
  find("said").textContent = `${data.pieces[answer.tokens[i]][0]}: ${row ? row.slice(1).join(" ") : ""}`;
});

// ---- choices

function check(button, on) { button.setAttribute("aria-checked", on); button.tabIndex = on ? 0 : -1; }
function choices(box, list, choose) {
  list.forEach(([key, label], n) => {
    const button = make("button", "", label);
    button.type = "button";
    button.dataset.key = key;
    button.setAttribute("role", "radio");
    check(button, n === 0);
    button.onclick = () => { [...box.children].forEach((b) => check(b, b === button)); choose(key); };
    box.append(button);
  });
  box.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const all = [...box.children], next = all[(all.indexOf(document.activeElement) + move + all.length) % all.length];
    next.focus();
    next.click();
  };
}
let wanted = "all";
function filter() {
  const words = find("search").value.toLowerCase();
  const only = find("clipped-only").checked, mixed = find("mixed-only").checked;
  document.body.classList.toggle("only", only);
  let count = 0;
  for (const group of data.groups) {
    const differ = group.answers.some((a) => a.reward !== group.answers[0].reward);
    let visible = 0;
    for (const a of group.answers) {
      const fits = wanted === "all" || a.verdict === wanted || (wanted === "truncated" && a.truncated);
      const on = fits && a.text.includes(words) && (differ || !mixed) && (!only || a.columns.clipped.includes(1));
      a.node.hidden = !on;
      visible += on;
    }
    group.node.hidden = !visible;
    count += visible;
  }
  find("count").textContent = count ? `${count} of ${flat.length} answers` : "no answer matches";
  hide();
}
function facts() {
  const tokens = flat.flatMap((a) => a.tokens).length, judged = flat.filter((a) => a.verdict !== "unjudged");
  const problems = data.groups.length < data.stored ? `${data.groups.length} of ${data.stored}` : data.stored;
  const list = [["problems", problems], ["answers", flat.length], ["tokens", tokens.toLocaleString("en")],
    ["mean reward", brief(mean(rewards))], ["right", percent(mean(judged.map((a) => a.verdict === "right")))]];
  if (quantity.clipped) list.push(["tokens clipped", percent(mean(column("clipped")))]);
  list.push(["mean |log ratio|", brief(mean(column("ratio").map((x) => Math.abs(Math.log(x)))))]);
  if (quantity.kl) list.push(["mean KL", brief(mean(column("kl")))]);
  list.push(["mean entropy", brief(mean(column("entropy")))]);
  for (const [name, value] of list) {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", value));
    find("facts").append(pair);
  }
}
facts();
find("groups").append(...data.groups.map(groupNode));
choices(find("quantities"), data.quantities.map((q) => [q.key, q.label]), (key) => {
  chosen = quantity[key];
  if (location.protocol !== "about:") history.replaceState(null, "", "#" + key);  // a frame's srcdoc has no address
  paint();
});
const present = ["right", "wrong", "unjudged"].filter((v) => flat.some((a) => a.verdict === v));
if (flat.some((a) => a.truncated)) present.push("truncated");
choices(find("verdicts"), ["all", ...present].map((name) => [name, name]), (name) => { wanted = name; filter(); });
find("only").hidden = !quantity.clipped;
find("search").oninput = find("clipped-only").onchange = find("mixed-only").onchange = filter;
find("filters").onsubmit = (event) => event.preventDefault();
const named = ({ key, label }) => ["#" + key, "#" + encodeURI(label)].includes(location.hash);  // by a button's text too
chosen = data.quantities.find(named) || chosen;
paint();
filter();

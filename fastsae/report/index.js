"use strict";
// The list of all latents: filtered, sorted, and ROWS of it shown at a time.
const ROWS = 50;
const data = JSON.parse(document.getElementById("data").textContent);
const [wanted, least, most, where, back, on] = ["wanted", "least", "most", "where", "back", "on"]
  .map((id) => document.getElementById(id));
const buttons = [...document.querySelectorAll("#list button")];
const body = document.querySelector("#list tbody");
const latent = data.count.map((_, i) => i);
const label = data.label.map((text) => text.toLowerCase() || "\uffff"); // without tokens, last
const columns = { ...data, latent, label };
let [by, down, first, found] = ["latent", false, 0, latent];

const percent = (share) => {
  const value = 100 * share;
  if (value === 0 || value === 100) return value + "\u00a0%";
  if (value < 0.001) return "<\u00a00.001\u00a0%";
  return value.toFixed(value >= 1 ? 1 : 1 - Math.floor(Math.log10(value))) + "\u00a0%";
};
const activation = (value) => {
  const size = Math.abs(value);
  const plain = value === 0 || (size >= 0.05 && size < 1e4);
  const padded = (power) => power.replace(/([+-])(\d)$/, (_, sign, digit) => sign + "0" + digit);
  const text = plain ? value.toFixed(2) : padded(value.toExponential(1));
  return text.replaceAll("-", "−");
};

const row = (i) => {
  const line = document.createElement("tr");
  const link = document.createElement("a");
  const number = String(Math.floor(i / data.per_page)).padStart(5, "0");
  link.href = "latents-" + number + ".html#" + i;
  link.textContent = i;
  const texts = [percent(data.count[i] / data.rows), activation(data.largest[i])];
  for (const content of [link, ...texts, activation(data.mean[i]), data.label[i]]) {
    line.insertCell().append(content);
  }
  return line;
};

const show = () => {
  const end = Math.min(first + ROWS, found.length);
  body.replaceChildren(...found.slice(first, end).map(row));
  const range = found.length ? (first + 1).toLocaleString("en") + " to " + end.toLocaleString("en") : "none";
  where.textContent = range + " of " + found.length.toLocaleString("en");
  back.disabled = first === 0;
  on.disabled = end === found.length;
};

const refresh = () => {
  const text = wanted.value.trim().toLowerCase();
  const low = (data.rows * Number(least.value)) / 100;
  const high = most.value === "" ? Infinity : (data.rows * Number(most.value)) / 100;
  const key = columns[by];
  const sign = down ? -1 : 1;
  found = latent
    .filter((i) => data.count[i] >= low && data.count[i] <= high)
    .filter((i) => label[i].includes(text) || String(i) === text)
    .sort((a, b) => (key[a] < key[b] ? -sign : key[a] > key[b] ? sign : a - b));
  for (const button of buttons) {
    const order = button.dataset.by !== by ? "none" : down ? "descending" : "ascending";
    button.parentElement.setAttribute("aria-sort", order);
  }
  first = 0;
  show();
};

for (const input of [wanted, least, most]) input.addEventListener("input", refresh);
for (const button of buttons) {
  button.addEventListener("click", () => {
    // Numbers are first asked for from the largest, ids and words from the first.
    down = by === button.dataset.by ? !down : !["latent", "label"].includes(button.dataset.by);
    by = button.dataset.by;
    refresh();
  });
}
back.addEventListener("click", () => { first -= ROWS; show(); });
on.addEventListener("click", () => { first += ROWS; show(); });
refresh();

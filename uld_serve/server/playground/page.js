// The playground: reads what the key may see, asks one question in every view that it has, and shades the tokens where it
// has both. The key is kept in a variable of this page and nowhere else.

import { Api } from "./api.js";
import { answer, scored } from "./asking.js";
import { Column } from "./column.js";
import { byId, make } from "./elements.js";
import { Tip } from "./tip.js";

const KEY_PAUSE_MS = 400;
const NO_CATALOG = { model: "", profiles: [], key: { allow_base: false, logprobs: false } };

const page = {
  api: new Api(""),
  catalog: NO_CATALOG,
  columns: {},
  run: null, // AbortController of what is being asked
  isReady: false,
};

// --- what the key may see

async function readCatalog() {
  stop();
  page.api = new Api(byId("key").value.trim());
  const asked = page.api;
  let words = "";
  let catalog = NO_CATALOG;
  try {
    catalog = await asked.catalog();
  } catch (error) {
    words = error.message;
  }
  if (asked !== page.api) return; // the key has changed meanwhile
  Object.assign(page, { catalog, isReady: !words });
  notice(words);
  showCatalog();
  if (words && !asked.key) byId("key").focus();
}

function showCatalog() {
  const { model, profiles, key } = page.catalog;
  byId("model").textContent = model;
  byId("profiles").querySelector(".chips").replaceChildren(...chips(profiles));
  byId("profiles").disabled = !profiles.length;
  byId("strength").disabled = !profiles.length;
  // A key that may not see the base may not weaken forgetting.
  byId("strength").min = key.allow_base ? "0" : "1";
  byId("ask").disabled = !page.isReady;
  showStrength();
  showColumns();
}

function chips(profiles) {
  if (!profiles.length) return [make("span", "quiet", page.isReady ? "no profile is served" : "…")];
  const isBound = profiles.some((one) => one.is_mandatory);
  return profiles.map((one, index) => {
    const box = make("input");
    box.type = "checkbox";
    box.name = "profile";
    box.value = one.name;
    box.checked = one.is_mandatory || (!isBound && index === 0);
    box.disabled = one.is_mandatory;
    const label = make("label", "chip", [box, make("span", "", one.name)]);
    label.title = one.is_mandatory ? "In every answer of this key" : `${one.rule.replaceAll("_", " ")}, ${one.method}`;
    return label;
  });
}

function chosen() {
  return [...document.querySelectorAll("input[name=profile]:checked")].map((box) => box.value);
}

function showColumns() {
  const { profiles, key } = page.catalog;
  page.columns = {};
  if (key.allow_base) page.columns.base = new Column("base", "Base", "nothing forgotten");
  if (profiles.length) page.columns.forgetting = new Column("forgetting", "Forgetting", "");
  byId("answers").replaceChildren(...Object.values(page.columns).map((column) => column.element));
  byId("legend").hidden = !seesBoth();
  showChosen();
}

function seesBoth() {
  const { key } = page.catalog;
  return key.allow_base && key.logprobs && "forgetting" in page.columns;
}

function showChosen() {
  if (page.columns.forgetting) page.columns.forgetting.subtitle = chosen().join(" + ") || "choose what to forget";
}

function showStrength() {
  const slider = byId("strength");
  const { value, min, max } = slider;
  byId("strength-value").textContent = `× ${Number(value).toFixed(2)}`;
  slider.style.setProperty("--filled", String((value - min) / (max - min)));
}

function settingsChanged() {
  showChosen();
  showStrength();
  for (const column of Object.values(page.columns)) if (column.view === "forgetting") column.outdate();
}

// --- asking

function question() {
  return {
    model: page.catalog.model,
    text: byId("prompt").value,
    mode: byId("mode").value,
    maxTokens: number("max-tokens"),
    temperature: number("temperature"),
    seed: number("seed"),
  };
}

function number(id) {
  const field = byId(id);
  return field.value === "" ? Number(field.defaultValue) : Number(field.value);
}

async function ask(event) {
  event.preventDefault();
  if (!page.isReady) return;
  const asked = question();
  const names = chosen();
  if (!asked.text.trim()) return refuse("Type a question first.", "prompt");
  if (!names.length && !page.columns.base) return refuse("Choose at least one profile to forget.", "profiles");
  stop();
  notice("");
  const run = new AbortController();
  page.run = run;
  busy(true);
  const views = { base: { names: null, strength: 1 }, forgetting: { names, strength: Number(byId("strength").value) } };
  const columns = Object.values(page.columns).filter((column) => column.view === "base" || names.length);
  await Promise.all(columns.map((column) => write(column, asked, views[column.view], run.signal)));
  if (columns.length === 2 && seesBoth()) await shade(asked.model, views, run.signal);
  if (page.run === run) busy(false);
}

function refuse(words, id) {
  notice(words);
  const field = byId(id);
  (field.querySelector("input") ?? field).focus();
}

async function write(column, asked, view, signal) {
  column.begin();
  say(`${column.title}: asked.`);
  try {
    for await (const piece of answer(page.api, asked, view, seesBoth(), signal)) {
      if (signal.aborted) break; // what came too late is not put into the next answer
      column.add(piece);
    }
    if (signal.aborted) return stopped(column);
    column.end();
    say(`${column.title} answered: ${column.text}`);
  } catch (error) {
    if (signal.aborted) return stopped(column);
    column.fail(error.message);
    say(`${column.title} failed: ${error.message}`);
  }
}

function stopped(column) {
  if (page.run === null) column.end("stopped"); // otherwise the next answer is being written there
}

/** Each answer scored in the other view as well: two requests that the server decides about as about any other. */
async function shade(model, views, signal) {
  const { base, forgetting } = page.columns;
  const compare = async (column, view) => {
    if (!column.isWhole || !column.ids.length) return;
    try {
      const other = await scored(page.api, model, column, view, signal);
      if (signal.aborted) return;
      if (column === base) column.shade(column.scores, other);
      else column.shade(other, column.scores);
    } catch (error) {
      if (!signal.aborted) column.note(`Not shaded: ${error.message}`);
    }
  };
  await Promise.all([compare(base, views.forgetting), compare(forgetting, views.base)]);
}

function stop() {
  page.run?.abort();
  page.run = null;
  busy(false);
}

function busy(isBusy) {
  byId("stop").hidden = !isBusy;
  byId("answers").setAttribute("aria-busy", String(isBusy));
}

function notice(words) {
  byId("notice").textContent = words;
  byId("notice").hidden = !words;
}

function say(words) {
  byId("status").textContent = words;
}

// --- wiring

function keys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
  if (event.key !== "Escape") return;
  if (Tip.isShown) Tip.hide();
  else if (page.run) stop();
}

let pause = 0;
byId("key").addEventListener("input", () => {
  clearTimeout(pause);
  pause = setTimeout(readCatalog, KEY_PAUSE_MS);
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(pause);
  readCatalog();
});
byId("form").addEventListener("submit", ask);
// A field that is wrong must be seen to be mended.
byId("form").addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), true);
byId("stop").addEventListener("click", () => {
  stop();
  byId("prompt").focus();
});
byId("profiles").addEventListener("change", settingsChanged);
byId("strength").addEventListener("input", settingsChanged);
document.addEventListener("keydown", keys);
document.addEventListener("scroll", () => Tip.hide(), { passive: true });
readCatalog();

// What a token was and became: its two probabilities and the likeliest alternatives in both views, beside the token that
// the pointer or the keyboard is on. There is one on the page.

import { LOWEST, probability } from "./asking.js";
import { byId, make } from "./elements.js";

const GAP_PX = 8;

export class Tip {
  static #of = null;

  /** `detail`: {text, before, after}. */
  static show(element, detail) {
    if (Tip.#of === element) return;
    Tip.hide();
    const tip = byId("tip");
    tip.replaceChildren(
      make("p", "tip-head", [
        make("code", "", visible(detail.text)),
        make("span", "tip-change", `${percent(detail.before.logprob)} → ${percent(detail.after.logprob)}`),
      ]),
      make("div", "tip-lists", [
        list("Before", detail.before.top, detail.text),
        list("With forgetting", detail.after.top, detail.text),
      ]),
    );
    tip.hidden = false;
    Tip.#of = element;
    element.setAttribute("aria-describedby", "tip");
    element.classList.add("pointed");
    place(tip, element.getClientRects()[0], element.closest(".column").getBoundingClientRect());
  }

  static hide() {
    byId("tip").hidden = true;
    Tip.#of?.removeAttribute("aria-describedby");
    Tip.#of?.classList.remove("pointed");
    Tip.#of = null;
  }

  static get isShown() {
    return Tip.#of !== null;
  }
}

function list(title, top, text) {
  const rows = top.map(([token, logprob]) => {
    const bar = make("span", "share-bar");
    bar.style.setProperty("--share", probability(logprob).toFixed(4));
    const row = make("li", "", [make("code", "", visible(token)), bar, make("span", "share", percent(logprob))]);
    if (token === text) row.className = "same";
    return row;
  });
  return make("section", "", [make("h4", "", title), make("ol", "", rows)]);
}

function percent(logprob) {
  if (logprob <= LOWEST) return "removed";
  const share = 100 * probability(logprob);
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
}

/** White space that could not be seen. */
function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

/** Under or over the token, and within its column where that is wide enough: the other answer stays to be read. */
function place(tip, at, column) {
  const { width, height } = tip.getBoundingClientRect();
  const last = Math.min(Math.max(column.right - GAP_PX, column.left + width), innerWidth - GAP_PX) - width;
  const left = Math.max(GAP_PX, Math.min(at.left, last));
  const fitsBelow = at.bottom + GAP_PX + height < innerHeight;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${fitsBelow ? at.bottom + GAP_PX : Math.max(GAP_PX, at.top - GAP_PX - height)}px`);
}

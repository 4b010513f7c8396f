// One answer on the page: its text as it comes, its tokens shaded once both views are known, and its receipt. Knows no
// request.

import { moved } from "./asking.js";
import { make } from "./elements.js";
import { Tip } from "./tip.js";

const LEAST_SHADE = 0.02;
const END_MARK = "∎";
const FINISHES = { stop: "complete", length: "cut off at the token limit" };

export class Column {
  /** `view` is "base" or "forgetting". */
  constructor(view, title, subtitle) {
    this.view = view;
    this.title = title;
    this.text = "";
    this.promptIds = [];
    this.ids = [];
    this.scores = [];
    this.isWhole = false;
    this.#subtitle = make("p", "subtitle", subtitle);
    this.#state = make("p", "state");
    this.#body = make("div", "answer");
    this.#body.setAttribute("role", "group");
    this.#body.setAttribute("aria-label", `${title}: answer`);
    this.#receipt = make("section", "receipt");
    this.#receipt.setAttribute("aria-label", `${title}: receipt`);
    const head = make("header", "column-head", [make("h2", "", title), this.#subtitle, this.#state]);
    this.element = make("article", `column ${view}`, [head, this.#body, this.#receipt]);
    this.element.dataset.view = view;
    this.#rest(make("p", "rest", "The answer will stand here."));
    this.#listen();
  }

  #subtitle;
  #state;
  #body;
  #receipt;
  #tokens = []; // {element, indices, detail}
  #waiting = []; // indices of tokens whose text has not come yet
  #current = 0;

  set subtitle(words) {
    this.#subtitle.textContent = words;
  }

  begin() {
    Object.assign(this, { text: "", promptIds: [], ids: [], scores: [], isWhole: false });
    this.#tokens = [];
    this.#waiting = [];
    this.#current = 0;
    this.#body.replaceChildren();
    this.#receipt.replaceChildren();
    this.element.classList.remove("failed", "stale");
    this.element.classList.add("busy");
    this.#state.textContent = "waiting";
  }

  add(piece) {
    if (piece.promptIds) this.promptIds = piece.promptIds;
    for (const [place, id] of piece.ids.entries()) {
      this.#waiting.push(this.ids.length);
      this.ids.push(id);
      this.scores.push(piece.scores[place]);
    }
    if (piece.text) {
      this.#state.textContent = "writing";
      this.text += piece.text;
      this.#append(piece.text);
    }
    if (piece.receipt) this.#receiptOf(piece.receipt);
    if (piece.finish) this.#finish(piece.finish);
    if (piece.usage) this.#usage(piece.usage);
  }

  /** No more comes; `words` say why if the answer is not whole. */
  end(words = "") {
    this.element.classList.remove("busy");
    if (words) this.#state.textContent = words;
  }

  fail(words) {
    this.end("failed");
    this.element.classList.add("failed");
    this.#body.append(make("p", "fault", words));
  }

  /** The settings are others than those of this answer. */
  outdate() {
    if (this.text) this.element.classList.add("stale");
  }

  /** `before` and `after`: {logprob, top} of every token, without and with forgetting. */
  shade(before, after) {
    for (const token of this.#tokens) {
      const shifts = token.indices.map((index) => ({ index, by: moved(before[index], after[index]) }));
      if (!shifts.length) continue;
      const { index, by } = shifts.reduce((a, b) => (Math.abs(b.by) > Math.abs(a.by) ? b : a));
      token.detail = { text: token.text, before: before[index], after: after[index] };
      token.element.dataset.moved = by.toFixed(3);
      if (Math.abs(by) < LEAST_SHADE) continue;
      token.element.style.setProperty("--moved", Math.abs(by).toFixed(3));
      token.element.classList.add(by > 0 ? "up" : "down");
    }
    this.element.classList.add("shaded");
    this.#focusable(0);
  }

  note(words) {
    this.#receipt.append(make("p", "receipt-note", words));
  }

  #rest(element) {
    this.#body.replaceChildren(element);
  }

  /** The space before a word stays outside, so that shades are words and not bricks. */
  #append(text) {
    const word = text.trimStart() || text;
    const element = make("span", "token", word);
    this.#body.append(text.slice(0, text.length - word.length), element);
    this.#tokens.push({ element, text, indices: this.#waiting, detail: null });
    this.#waiting = [];
  }

  #finish(reason) {
    this.isWhole = true;
    this.#state.textContent = FINISHES[reason] ?? reason;
    if (reason === "stop") {
      this.#append(END_MARK);
      const end = this.#tokens.at(-1);
      end.element.classList.add("end");
      end.text = "end of the answer";
    }
    if (!this.text) this.#body.prepend(make("span", "rest", "(no text) "));
  }

  #receiptOf(receipt) {
    const applied = receipt.profiles.map((one) =>
      make("li", "", [
        make("strong", "", one.name),
        make("span", "digest", `@${one.digest.replace("sha256:", "").slice(0, 12)}`),
        make("span", "rule", `${one.rule.replaceAll("_", " ")} × ${Number(one.strength.toPrecision(3))}`),
      ]),
    );
    const list = make("ul", "", applied.length ? applied : [make("li", "", make("strong", "", "nothing was forgotten"))]);
    const head = make("h3", "", "Receipt, written by the sampler");
    this.#receipt.replaceChildren(head, list, make("p", "receipt-id", `${receipt.id} · engine ${receipt.engine}`));
  }

  #usage(usage) {
    const words = `${usage.prompt_tokens} tokens in the question, ${usage.completion_tokens} in the answer`;
    this.#receipt.append(make("p", "receipt-usage", words));
  }

  #listen() {
    const show = (event) => this.#show(event.target.closest(".token"));
    this.#body.addEventListener("pointerover", show);
    this.#body.addEventListener("pointerleave", () => Tip.hide());
    this.#body.addEventListener("focusin", show);
    this.#body.addEventListener("focusout", () => Tip.hide());
    this.#body.addEventListener("keydown", (event) => this.#walk(event));
  }

  #show(element) {
    const token = this.#tokens.find((one) => one.element === element);
    if (token?.detail) Tip.show(token.element, token.detail);
    else Tip.hide();
  }

  /** Tab reaches one token; the arrow keys go on from it. */
  #focusable(index) {
    this.#tokens[this.#current]?.element.removeAttribute("tabindex");
    this.#current = index;
    this.#tokens[index]?.element.setAttribute("tabindex", "0");
  }

  #walk(event) {
    const last = this.#tokens.length - 1;
    const goal = {
      ArrowRight: Math.min(this.#current + 1, last),
      ArrowLeft: Math.max(this.#current - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (goal === undefined || !this.element.classList.contains("shaded")) return;
    event.preventDefault();
    this.#focusable(goal);
    this.#tokens[goal].element.focus();
  }
}

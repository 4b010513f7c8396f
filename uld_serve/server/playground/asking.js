// One question in one view: the request, its streamed pieces, and the same tokens scored in the other view. The server
// decides what a key may see; a view that it refuses is not asked for here by another way. Knows no element of the page.

export const TOP = 5; // alternatives: the most that /v1/completions lists
export const LOWEST = -9999; // how the server writes a token that forgetting has removed

/**
 * What is forgotten in a view: `names` null is the base.
 * @typedef {{names: string[] | null, strength: number}} View
 */

function forget(view) {
  return view.names === null
    ? { forget_profile: null }
    : { forget_profile: view.names, forget_strength: view.strength };
}

/** Path and body of a question, and how its events are read. */
function request(question, view, hasLogprobs) {
  const common = {
    model: question.model,
    max_tokens: question.maxTokens,
    temperature: question.temperature,
    seed: question.seed,
    stream: true,
    stream_options: { include_usage: true },
    ...forget(view),
  };
  if (question.mode === "text") {
    const scores = hasLogprobs ? { logprobs: TOP, return_token_ids: true } : {};
    return { path: "v1/completions", body: { ...common, ...scores, prompt: question.text }, read: readText };
  }
  const scores = hasLogprobs ? { logprobs: true, top_logprobs: TOP, return_token_ids: true } : {};
  const messages = [{ role: "user", content: question.text }];
  return { path: "v1/chat/completions", body: { ...common, ...scores, messages }, read: readChat };
}

function readChat(choice) {
  const rows = choice.logprobs?.content ?? [];
  return {
    text: choice.delta.content ?? "",
    scores: rows.map((row) => ({ logprob: row.logprob, top: row.top_logprobs.map((one) => [one.token, one.logprob]) })),
  };
}

function readText(choice) {
  return { text: choice.text, scores: choice.logprobs ? rowsOf(choice.logprobs) : [] };
}

function rowsOf(logprobs) {
  return logprobs.token_logprobs.map((logprob, index) => ({
    logprob,
    top: Object.entries(logprobs.top_logprobs[index] ?? {}).sort((a, b) => b[1] - a[1]).slice(0, TOP),
  }));
}

/** The pieces of an answer, in order; the last has `finish`. A piece has `scores` and `ids` of its tokens if asked for. */
export async function* answer(api, question, view, hasLogprobs, signal) {
  const { path, body, read } = request(question, view, hasLogprobs);
  for await (const event of api.stream(path, body, signal)) {
    const choice = event.choices[0];
    const piece = choice ? read(choice) : { text: "", scores: [] };
    yield {
      ...piece,
      ids: choice?.token_ids ?? [],
      promptIds: event.prompt_token_ids ?? choice?.prompt_token_ids ?? null,
      finish: choice?.finish_reason ?? null,
      receipt: event.forget ? { ...event.forget, id: event.id } : null,
      usage: event.usage ?? null,
    };
  }
}

/** The tokens `ids` after `promptIds`, scored in `view`: one {logprob, top} each. Draws nothing. */
export async function scored(api, model, { promptIds, ids }, view, signal) {
  const asked = { model, prompt: [...promptIds, ...ids], max_tokens: 0, echo: true, logprobs: TOP, ...forget(view) };
  const found = await api.post("v1/completions", asked, signal);
  return rowsOf(found.choices[0].logprobs).slice(promptIds.length);
}

/** How far forgetting moved a token, -1 to 1: the share that the smaller probability lacks to the larger one, negative
 * where forgetting made the token less likely. */
export function moved(before, after) {
  const difference = after.logprob - before.logprob;
  return Math.sign(difference) * (1 - Math.exp(-Math.abs(difference)));
}

export function probability(logprob) {
  return logprob <= LOWEST ? 0 : Math.exp(logprob);
}

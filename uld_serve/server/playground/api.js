// The server's API as this page uses it: a few requests, and streams that do not take a broken end for a whole answer.
// Knows no element of the page.

/** What went wrong, in words for whoever reads the page. `status` 0: no answer came at all. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";
const BROKEN_OFF = "The answer broke off: the connection ended before it was whole.";

/** `key` "" sends none. */
export class Api {
  constructor(key) {
    this.key = key;
  }

  /** What this key may see: {model, profiles, key: {allow_base, logprobs}}. */
  async catalog(signal) {
    const [models, profiles] = await Promise.all([
      this.#json("v1/models", { signal }),
      this.#json("v1/forget_profiles", { signal }),
    ]);
    const card = models.data[0];
    return { model: card ? card.parent ?? card.id : "", profiles: profiles.data, key: profiles.key };
  }

  post(path, body, signal) {
    return this.#json(path, { method: "POST", body: JSON.stringify(body), signal });
  }

  /** The events of a streamed answer; throws where it does not end with [DONE]. */
  async *stream(path, body, signal) {
    const response = await this.#fetch(path, { method: "POST", body: JSON.stringify(body), signal });
    let isDone = false;
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        isDone = true;
        continue;
      }
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(sentence(event.error.message), response.status);
      yield event;
    }
    if (!isDone) throw new ApiError(BROKEN_OFF);
  }

  async #json(path, options) {
    return (await this.#fetch(path, options)).json();
  }

  async #fetch(path, options) {
    const headers = {};
    if (options.body !== undefined) headers["Content-Type"] = "application/json";
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError(UNREACHABLE);
    }
    if (!response.ok) throw await problem(response, this.key);
    return response;
  }
}

async function problem(response, key) {
  if (response.status === 401) {
    const words = key ? "The server does not know this key." : "This server wants an API key: type it in above.";
    return new ApiError(words, 401);
  }
  const body = await response.json().catch(() => null);
  const told = sentence(body?.error?.message ?? `The server answered with ${response.status}.`);
  const wait = response.headers.get("Retry-After");
  return new ApiError(wait ? `${told} Try again in ${wait} s.` : told, response.status);
}

/** A server's words, which begin small and end without a stop. */
function sentence(words) {
  const begun = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

/** The data of server-sent events, as whole as the stream brings them. */
async function* events(body) {
  // Not through a TextDecoderStream: where a connection breaks, that drops what came before, which says why.
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice(6);
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(BROKEN_OFF);
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The openai client for JavaScript against a server: node use_openai.mjs MODULES URL MODEL PROFILE. Exits with 1 and says
// what differs; prints "ok" last.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [modules, url, model, profile] = process.argv.slice(2);
const OpenAI = createRequire(`${modules}/`)("openai").default;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const few = { max_tokens: 6, seed: 3 };

const names = [];
for await (const card of client.models.list()) names.push(card.id);
assert.ok(names.includes(`${model}:${profile}`), names.join(" "));

const whole = await client.chat.completions.create({ model: `${model}:${profile}`, messages, ...few });
assert.equal(whole.choices[0].message.role, "assistant");
assert.equal(whole.usage.completion_tokens <= 6, true);
assert.equal(whole.forget.profiles[0].name, profile);

const stream = await client.chat.completions.create({
  model, messages, ...few, forget_profile: profile, stream: true, stream_options: { include_usage: true },
});
let text = "";
let last;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  last = chunk;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(last.usage.total_tokens, whole.usage.total_tokens);

const schema = {
  type: "object", properties: { a: { enum: ["owl", 7] } }, required: ["a"], additionalProperties: false,
};
const kept = await client.chat.completions.create({
  model: `${model}:${profile}`, messages, max_tokens: 200, seed: 3,
  response_format: { type: "json_schema", json_schema: { name: "owl", strict: true, schema } },
});
assert.ok(["owl", 7].includes(JSON.parse(kept.choices[0].message.content).a));

const scored = await client.completions.create({
  model, prompt: "Hi", max_tokens: 0, echo: true, logprobs: 1, temperature: 0,
});
assert.equal(scored.choices[0].text, "Hi");
assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);

await assert.rejects(
  client.chat.completions.create({ model, messages, forget_profil: profile }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "forget_profil",
);
await assert.rejects(
  client.chat.completions.create({ model: "gpt-4", messages }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
console.log("ok");

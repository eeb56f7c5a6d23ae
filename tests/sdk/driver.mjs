// Drives the official JavaScript SDK: one JSON task per line on standard input, one JSON outcome per line on standard
// output. The folder that holds node_modules is the only argument.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const { OpenAI } = createRequire(`${process.argv[2]}/`)("openai");

async function run(task) {
  const client = new OpenAI({ baseURL: task.base_url, apiKey: "sk-test", maxRetries: task.retries ?? 0 });
  const outcome = { id: task.id, texts: [], kinds: [], finish: null, usage: null, error: null };
  const giveUp = new AbortController();
  const timer = task.patience ? setTimeout(() => giveUp.abort(), task.patience * 1000) : undefined;
  const options = { signal: giveUp.signal };
  try {
    if (task.what === "models") {
      for await (const model of client.models.list(options)) outcome.texts.push(model.id);
    } else if (task.what === "responses") {
      for await (const event of await client.responses.create(task.body, options)) outcome.kinds.push(event.type);
    } else if (task.body.stream) {
      const stream = await client.chat.completions.create(task.body, options);
      for await (const chunk of stream) {
        if (chunk.usage) outcome.usage = chunk.usage;
        for (const choice of chunk.choices) {
          if (choice.delta.content) outcome.texts.push(choice.delta.content);
          outcome.finish = choice.finish_reason ?? outcome.finish;
        }
        if (task.take && outcome.texts.length >= task.take) break;
      }
    } else {
      const answer = await client.chat.completions.create(task.body, options);
      outcome.texts.push(answer.choices[0].message.content);
      outcome.finish = answer.choices[0].finish_reason;
    }
  } catch (error) {
    const { name, message, code, status, requestID } = error;
    outcome.error = { kind: error.constructor.name, name, message, code, status, request_id: requestID };
  }
  clearTimeout(timer);
  outcome.gave_up = giveUp.signal.aborted;
  return outcome;
}

console.log(JSON.stringify({ node: process.version }));
for await (const line of createInterface({ input: process.stdin })) {
  run(JSON.parse(line)).then((outcome) => console.log(JSON.stringify(outcome)));
}

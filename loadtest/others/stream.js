// k6 run -u 250 -d 20s -e TARGET=http://127.0.0.1:8080 loadtest/others/stream.js
// The same exchange as `python -m loadtest run steady`; k6 sees whole answers only, so it shows when a stream ends late,
// not when an event does.
import http from "k6/http";
import { check } from "k6";

const body = JSON.stringify({
  model: "m",
  stream: true,
  messages: [{ role: "user", content: "Stream a haiku." }],
  user: "lt-0;tokens=150;interval=0.025",
});
const params = { headers: { "Content-Type": "application/json", Authorization: "Bearer sk-test" } };

export default function () {
  const answer = http.post(`${__ENV.TARGET}/v1/chat/completions`, body, params);
  check(answer, { "came to its end": (one) => one.status === 200 && one.body.endsWith("data: [DONE]\n\n") });
}

-- wrk -t1 -c64 -d10 --latency -s loadtest/others/small.lua http://127.0.0.1:8080/v1/chat/completions
-- The same exchange as `python -m loadtest run small`.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-test"
wrk.body = '{"model":"m","stream":false,"messages":[{"role":"user","content":"Stream a haiku."}],"user":"lt-0;tokens=8"}'

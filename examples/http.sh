#!/bin/sh
# OpenAI's API with nothing but curl: http.sh [BASE_URL]
set -eu
url=${1:-http://127.0.0.1:8000/v1}
curl -sS --fail-with-body "$url/models"
echo
curl -sSN --fail-with-body "$url/completions" \
    -H 'content-type: application/json' -H "authorization: Bearer ${API_KEY:-none}" \
    -d '{"prompt": "def fibonacci(n):", "max_tokens": 16, "stream": true}'

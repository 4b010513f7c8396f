"""HTTP: the OpenAI completions API and the policy in front of the engine. Knows no tensor."""

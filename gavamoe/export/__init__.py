"""A run as plain models that know nothing of gavamoe: folders of transformers, GGUF files.

With its gate fixed an explainer is a public architecture, and users and items are ordinary tokens.

exported_run  the whole of it: one model a gate, the pairs' gates, the prompt, a client
plain_model   an explainer's weights under a public architecture's names
slot_tokens   users and items as tokens: names, embeddings, output rows that never win
gguf_file     a plain model as one GGUF file, in full or quantized
client.py.txt  what is copied beside the models: picks the gate, fills in the prompt
"""

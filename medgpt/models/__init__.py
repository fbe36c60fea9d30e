"""Models and tokenizers of Hugging Face, as medgpt uses them."""

import logging

# when peft imports it, it recommends a package that medgpt does not need, in every process
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

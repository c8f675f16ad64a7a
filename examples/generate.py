# SPDX-License-Identifier: Apache-2.0
"""Two turns of a chat on one packed cache, with transformers' own generate().

python examples/generate.py [MODEL]        a folder or a name; default: the small model of `make demo`
"""

import sys

import kvarn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    if len(sys.argv) > 1:
        name = sys.argv[1]
    else:
        from kvarn.demo.model import smollm2

        name = smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    cache, talk = kvarn.hf.Cache(model.config, "kvarn_k4v4_g128", feedback=kvarn.hf.feedback(model)), []
    for question in ("What is a harbour? Answer in two sentences.", "And a lighthouse?"):
        talk.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=80, do_sample=False)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        talk.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}\n{cache}\n")


if __name__ == "__main__":
    main()

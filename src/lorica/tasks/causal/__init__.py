"""Language modelling and instruction tuning.

`tokenising` makes `records` of texts, of prompts with completions and of `conversations`; `objective` has the loss and
the evaluation, `answers` what a model gives to a prompt.
"""

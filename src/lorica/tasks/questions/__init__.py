"""Extractive question answering (SQuAD v1.1 and v2.0).

Rajpurkar et al., arXiv 1606.05250 (v1.1) and arXiv 1806.03822 (v2.0, questions without an answer). Windows over long
contexts and the score of no answer: Devlin et al., arXiv 1810.04805, sections 4.2 and 4.3.

`squad_json` reads the official files; `tokenising` cuts contexts into `windows` and makes `records`. `objective` has
the loss and the evaluation, which finds `answers` and compares them by the official scripts' `metrics`.
"""

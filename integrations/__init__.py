"""Our problems, verdicts and corrections in other libraries, and theirs in ours. A module needs the library that it is
named after, and no other room imports it.

>>> from integrations.verl import compute_score
>>> compute_score("openai/gsm8k", "6 times 7 is 42. #### 42", "42")
{'score': 1.0, 'acc': True, 'pred': '42', 'status': 'right'}
"""

"""Secure summation: the server learns the sum of the clients' tensors, but no single client's tensors.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017 (ePrint 2017/281): the
protocol for an honest-but-curious server, with dropouts, and with checks against a server that is not honest. The
functions take and return bytes and tensors. One summation over clients `u` with threshold `t`:

| stage | client | server |
|---|---|---|
| 1 keys | `advertise`: checks the terms; sends fresh X25519 keys `c_u` (encryption) and `s_u` (masks) | `check_keys` |
| 2 shares | `share`: draws a seed `b_u`; sends each client a Shamir share of `b_u` and of `s_u`, encrypted | `route` |
| 3 masked input | `mask`: `y_u = q_u + G(b_u) + Σ_{v>u} G(s_uv) − Σ_{v<u} G(s_uv)  mod 2^k` | `check_masked` |
| 4 reveal | `reveal`: for each client, a share of `b` if its `y` arrived, else one of `s`; never both | `unmask` |

`q_u` is the quantised input (`quantisation.py`), `s_uv` the seed that u and v agree on, `G` the ChaCha20 keystream as
words of k bits. In `Σ y_u` the pairwise masks of the clients that answered cancel. From `t` shares each, the server
recovers the secrets that remove the other masks: the seeds `b_u` of those clients, and the keys `s_v` of the clients
that shared but did not answer. Clients that stop before they share are not in the sum. With fewer than `t` clients at
any stage the summation fails, and the server has only masked values.

Every function is pure: `(state, incoming) -> (state, outgoing)`. A client's `State` is secret. It can be converted to
bytes and back, so each stage may run in a new process. Store the new state before the outgoing bytes leave, and never
restore an older one: two different inputs under the same masks would reveal their difference. Functions raise
`SummationError`, which names the client that sent wrong bytes, if there is one.

What this protects: the tensors are releases of a differentially private mechanism with each client's full noise, so the
privacy guarantee does not depend on this package. ε is the same with and without it; quantisation and clipping are
post-processing. Secure summation additionally hides the single releases.

What the server cannot change: it proposes the terms of a sum (`Agreement`: members, weights, shapes and setup) before
keys are exchanged, and each client checks them against its `Requirements`. All keys and masks are bound to the terms. A
client's `Part` records every input that was in a sum of the run, and refuses a second sum that would reveal it.

What it does not protect:

* A server that distributes its own public keys can impersonate clients, unless the clients know each other's identity
  keys (`Requirements.members`).
* The server together with `t` or more clients can reveal the other clients' values. `t` is a majority of the clients,
  so a server that gives clients different lists of dropouts cannot collect `t` shares of both kinds.
* At most `n − t` clients may drop out.
* The sum itself is revealed: two sums of the same tensors, with and without one client, reveal that client's tensors. A
  client whose stored `Part` was restored from a backup does not notice the second sum.
* A client can send any value within the bound without detection. Sums are neither robust nor verifiable.
"""

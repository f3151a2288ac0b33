"""The operations of `cnnjax.nn` in forms that XLA's CPU backend runs fast.

Only `cnnjax.nn` imports this package, and `cnnjax.nn.lowering` decides when it is used. The reasons
are in docs/cpu_forms.md. Nearly every operation is a function under `jax.jit`: layers of one
shape are traced once, gradients too, and XLA inlines the calls before it optimizes, except for
barriers (`barrier`), which must stay calls.
"""

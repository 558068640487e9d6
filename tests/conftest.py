"""Every test runs on 8 simulated CPU devices; this must happen before anything touches a device."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

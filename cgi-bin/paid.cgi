#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Where one comes back to from Stripe or PayPal, paid or not."""

import till
import web

web.serve(till.back)

#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Takes the webhooks of PayPal, which are signed."""

import till
import web

web.serve(post=lambda site: till.hook(site, 'paypal'), login=False,
          token=False, raw=True)

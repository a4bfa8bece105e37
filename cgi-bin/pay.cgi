#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Where one chooses how much to pay, and how."""

import till
import web

web.serve(till.choose, till.begin)

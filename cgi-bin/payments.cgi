#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What was paid, and what came back."""

import figures
import web

web.serve(figures.payments)

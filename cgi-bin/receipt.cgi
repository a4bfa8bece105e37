#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A receipt, to be printed."""

import figures
import web

web.serve(figures.receipt)

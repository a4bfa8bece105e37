#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The first page: what this is and what it costs."""

import figures
import web

web.serve(figures.home, login=False)

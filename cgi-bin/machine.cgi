#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""One machine in one month."""

import figures
import web

web.serve(figures.machine_page)

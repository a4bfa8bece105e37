#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A month of the account, as a page, a chart or CSV."""

import figures
import web

web.serve(figures.activity_page)

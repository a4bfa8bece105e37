#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""All that is kept of the account, for its owner."""

import figures
import web

web.serve(figures.export)

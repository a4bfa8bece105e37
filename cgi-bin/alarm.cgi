#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Answers to alarms, from Twilio and from links in mails: cronwatch(1).

Runs as the user whose state it is; CRONWATCH_DIR says where that is.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(
    __file__))))
import cronwatch  # noqa: E402

sys.exit(cronwatch.main(['callback']))

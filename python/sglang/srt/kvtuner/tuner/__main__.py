import sys

from sglang.srt.kvtuner.tuner.cli import main

sys.exit(main())

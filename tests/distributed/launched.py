"""`circuitmill launch` of another module: python -m tests.distributed.launched PER_NODE MODULE ARGUMENTS..."""

import sys

from circuitmill.launch import launch

if __name__ == "__main__":
    ending = launch(sys.argv[3:], per_node=int(sys.argv[1]), module=sys.argv[2], last_words_s=20.0)
    sys.stderr.write(f"launch: {ending.text or 'no rank failed'}\n")
    sys.exit(ending.code)

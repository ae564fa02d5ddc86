"""`python -m circuitmill`."""

from circuitmill.cli import main

raise SystemExit(main())

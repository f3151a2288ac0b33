"""One script or package per study; each writes a report with tables and figures."""

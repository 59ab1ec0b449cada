"""What finished runs say: tables, estimates with intervals, figures, the site, the playground."""

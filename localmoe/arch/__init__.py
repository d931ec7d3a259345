"""Model families, one file each: MODEL_TYPES, Config, load, forward; they call ops and know no device."""

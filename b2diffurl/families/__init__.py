"""Model families: the only room that knows diffusers' denoisers and PEFT."""

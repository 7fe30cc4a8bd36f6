SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#documents",
  deepLinking: true,
  // No badge of a validator elsewhere.
  validatorUrl: null,
});
